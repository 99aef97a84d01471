"""lm-eval by HTTP and with transformers in its own process: the same questions, scored and answered."""

import json
import sys
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.tasks import TaskManager

url, checkpoint, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
QUESTIONS = f"""
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder / "questions.json"}}}}}
test_split: test
doc_to_text: question
target_delimiter: ""
"""
SCORED = """
task: scored
output_type: multiple_choice
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc}]
"""
ANSWERED = """
task: answered
output_type: generate_until
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 24, do_sample: false}
metric_list: [{metric: exact_match}]
"""
for task in (SCORED, ANSWERED):
    (folder / f"{task.split()[1]}.yaml").write_text(QUESTIONS + task)
tasks = TaskManager(include_path=str(folder), include_defaults=False)
here = {"pretrained": checkpoint, "dtype": "float32", "device": "cpu"}
served = {"model": "smollm2-135m-instruct", "num_concurrent": 4}
completions = {"base_url": f"{url}/completions", "tokenizer_backend": "remote", "tokenized_requests": True}
chats = {"base_url": f"{url}/chat/completions"}


def told(task: str, model: str, arguments: dict[str, Any], chat: bool = False) -> dict[str, Any]:
    """What a model says to each question, and what lm-eval makes of that."""
    found = lm_eval.simple_evaluate(
        model=model,
        model_args=arguments,
        tasks=[task],
        task_manager=tasks,
        apply_chat_template=chat,
        log_samples=True,
        bootstrap_iters=0,
    )
    samples = sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
    metric = {"scored": "acc,none", "answered": "exact_match,none"}[task]
    said = [[each[0] for each in sample["resps"]] for sample in samples]
    return {"said": said, "metric": found["results"][task][metric]}


by_http = {
    "scored": told("scored", "local-completions", served | completions),
    "answered": told("answered", "local-completions", served | completions),
    "chat": told("answered", "local-chat-completions", served | chats, chat=True),
}
in_process = {
    "scored": told("scored", "hf", here),
    "answered": told("answered", "hf", here),
    "chat": told("answered", "hf", here, chat=True),
}
print(json.dumps({"by_http": by_http, "in_process": in_process}))
