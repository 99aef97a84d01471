"""`pyramidserve demo`: two questions to a local cluster, and what they took."""

import argparse
from pathlib import Path
from pydoc_data.topics import topics

from cluster.commands.chart import pyramid_chart
from cluster.commands.serve import say
from cluster.config import ClusterConfig
from cluster.front.tenants import first_token
from pyramidserve import ChatMessage, Client, Compression, Receipt, Stopping, Tokens

SUMMARY = "answer two questions on a cluster on this machine"

# A chapter of the Python reference that every Python has: 2,212 tokens of the embedded model.
DOCUMENT = topics["execmodel"]
KV_KEEP = 0.45


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the command."""
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="Serve config file; default: the embedded model"
    )


def run(arguments: argparse.Namespace) -> int:
    """Asks both questions and shows the last one's receipt and pyramid."""
    from cluster.deploy.deployment import read_deployment
    from cluster.deploy.guardian import guarded

    deployment = read_deployment(arguments.config)

    def work() -> int:
        from cluster.deploy.serving import serving

        certificate, token = access(deployment.config)
        with (
            serving(deployment, "", say) as target,
            Client(target, token=token, certificate=certificate) as client,
        ):
            ask(client, "Why is the sky blue?", "", "prune")
            ask(client, "What is a block?", DOCUMENT, "prune")
            receipt = ask(client, "What is a block?", DOCUMENT, "evict")
            print(pyramid_chart(receipt.layers))
        return 0

    return guarded(work, orphan_seconds=0.0)


def access(config: ClusterConfig) -> tuple[bytes | None, str | None]:
    """The certificate and the token with which the cluster's own settings let a client in."""
    certificate = Path(config.tls_certificate).read_bytes() if config.tls_certificate else None
    return certificate, first_token(config.tenants_file)


def ask(client: Client, question: str, document: str, prefill: str) -> Receipt:
    """Streams the answer to the terminal and shows its receipt."""
    about = f" (about a document of {len(document):,} characters)" if document else ""
    print(f"\nyou> {question}{about}\npyramid/{prefill}> ", end="", flush=True)
    messages = [ChatMessage("user", f"{document}\n\n{question}".strip())]
    compression = Compression("pyramid", prefill, kv_keep=KV_KEEP)
    with client.stream(messages, stopping=Stopping(max_tokens=64), compression=compression) as events:
        for event in events:
            match event:
                case Tokens():
                    print(event.text, end="", flush=True)
                case Receipt():
                    print("\n" + describe(event))
                    return event
    raise AssertionError("the stream ended without a receipt")


def describe(receipt: Receipt) -> str:
    """A receipt in a few lines."""
    device = receipt.peak_device_bytes
    bound = f" (bound by the {receipt.kv_keep_bound_by})" if receipt.kv_keep_bound_by else ""
    mebibyte = 2**20
    return "\n".join(
        (
            f"  tokens    {receipt.prompt_tokens} in, {receipt.output_tokens} out, "
            f"ended by {receipt.finish_reason.value}",
            f"  KV kept   {receipt.kv_keep_reached:.1%} of the prompt's{bound}",
            f"  device    {device.kv / mebibyte:.1f} MiB KV, {device.scores / mebibyte:.2f} scores, "
            f"{device.tables / mebibyte:.2f} tables, {device.prefill_workspace / mebibyte:.1f} prefill",
            f"  host      {receipt.spilled_bytes / mebibyte:.1f} MiB spilled, "
            f"{receipt.dropped_bytes / mebibyte:.1f} dropped",
            f"  times     first token after {receipt.time_to_first_token:.2f} s, "
            f"then {receipt.inter_token_p50 * 1000:.0f} ms each (p99 {receipt.inter_token_p99 * 1000:.0f})",
        )
    )
