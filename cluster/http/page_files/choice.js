// What the reader has chosen for the next reply.

/** The fields of a request that the settings of `form` say. */
export function chosen(form) {
  const of = (name) => form.querySelector(`#${name}`).value;
  const [policy, prefill] = of("policy").split("/");
  const compression = { policy, prefill, kv_keep: Number(of("kv-keep")), recall: of("recall") };
  const asked = Object.entries(compression).filter(([, value]) => value);
  return {
    ...(asked.length && { compression: Object.fromEntries(asked) }),
    ...(of("max-tokens") && { max_tokens: Number(of("max-tokens")) }),
  };
}
