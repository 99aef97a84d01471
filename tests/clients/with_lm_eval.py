"""lm-eval's `local-completions`: a likelihood task on questions that the caller has written."""

import json
import sys
from pathlib import Path

import lm_eval
from lm_eval.tasks import TaskManager

url, folder = sys.argv[1], Path(sys.argv[2])
(folder / "questions.yaml").write_text(
    f"""
task: questions
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder / "questions.json"}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: question
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""
)
told = lm_eval.simple_evaluate(
    model="local-completions",
    model_args={
        "model": "smollm2-135m-instruct",
        "base_url": f"{url}/completions",
        "tokenizer_backend": "remote",
        "tokenized_requests": True,
        "num_concurrent": 4,
    },
    tasks=["questions"],
    task_manager=TaskManager(include_path=str(folder), include_defaults=False),
    log_samples=True,
    bootstrap_iters=0,
)
samples = sorted(told["samples"]["questions"], key=lambda sample: sample["doc_id"])
scores = [[float(response[0][0]) for response in sample["resps"]] for sample in samples]
print(json.dumps({"scores": scores, "acc": told["results"]["questions"]["acc,none"]}))
