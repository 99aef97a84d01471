// What the reader has chosen for the next reply.

/** Offers `policies` beside that of the deployment. */
export function offer(select, policies) {
  const [deployed, ...others] = select.options;
  if (others.map((each) => each.value).join() === policies.join()) return;
  const chosen = select.value;
  select.replaceChildren(deployed, ...policies.map((each) => new Option(each)));
  select.value = policies.includes(chosen) ? chosen : "";
}

/** The fields of a request that the settings of `form` say. */
export function chosen(form) {
  const of = (name) => form.querySelector(`#${name}`).value;
  const [policy, prefill] = of("policy").split("/");
  const compression = {
    policy,
    prefill,
    kv_keep: Number(of("kv-keep")),
    kv_bytes_keep: Number(of("kv-bytes-keep")),
    recall: of("recall"),
  };
  const asked = Object.entries(compression).filter(([, value]) => value);
  return {
    ...(asked.length && { compression: Object.fromEntries(asked) }),
    ...(of("max-tokens") && { max_tokens: Number(of("max-tokens")) }),
  };
}
