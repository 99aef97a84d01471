"""guidellm: three users at a time on each route that it can load; the tokenizer is a folder, no hub's."""

import json
import os
import subprocess
import sys
from pathlib import Path

url, tokenizer, folder = sys.argv[1:]
told = {}
for route in ("chat/completions", "completions", "responses"):
    report = Path(folder) / f"{route.replace('/', '-')}.json"
    subprocess.run(
        [
            *(sys.executable, "-m", "guidellm", "run", "--disable-console-interactive"),
            *("--backend", f"kind=openai_http,target={url},request_format=/v1/{route}"),
            *("--profile", "kind=concurrent,streams=3"),
            *("--constraint", "kind=max_requests,count=6"),
            *("--tokenizer", f"kind=huggingface_auto,model={tokenizer}"),
            *("--data", "kind=synthetic_text,prompt_tokens=48,output_tokens=16"),
            *("--output", f"kind=json,path={report}"),
        ],
        check=True,
        stdout=sys.stderr,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    (benchmark,) = json.loads(report.read_text())["benchmarks"]
    told[route] = {
        "requests": benchmark["metrics"]["request_totals"],
        "prompts": [each["prompt_tokens"] for each in benchmark["requests"]["successful"]],
        "outputs": [each["output_tokens"] for each in benchmark["requests"]["successful"]],
    }
print(json.dumps(told))
