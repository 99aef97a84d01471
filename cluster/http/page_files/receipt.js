// What a reply took, in figures.

/** Shows a receipt in place of what `list` has. */
export function showReceipt(list, receipt) {
  const target = receipt.kv_keep_target;
  const asked = target === null ? "" : ` of ${target.toFixed(2)} asked`;
  const bound = receipt.kv_keep_bound_by && `, for ${receipt.kv_keep_bound_by}`;
  const figures = {
    "Time to first token": seconds(receipt.time_to_first_token),
    "Between tokens, p50": seconds(receipt.inter_token_p50),
    "Tokens, prompt + reply": `${receipt.prompt_tokens} + ${receipt.output_tokens}`,
    Reused: `${receipt.reused_tokens} of ${receipt.prompt_tokens}`,
    "kv_keep reached": receipt.kv_keep_reached.toFixed(2) + asked + bound,
    "Of the bytes in 16 bits": receipt.kv_bytes_keep_reached.toFixed(2),
    Policy: receipt.policy,
    Recall: receipt.recall,
  };
  const pairs = Object.entries(figures).map(([name, value]) => {
    const pair = document.createElement("div");
    pair.append(text("dt", name), text("dd", value));
    return pair;
  });
  list.replaceChildren(...pairs);
}

function seconds(value) {
  return value < 1 ? `${(1000 * value).toFixed(value < 0.1 ? 1 : 0)} ms` : `${value.toFixed(2)} s`;
}

function text(name, content) {
  const made = document.createElement(name);
  made.textContent = content;
  return made;
}
