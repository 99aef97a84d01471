"""Facts in a document that a first question is not about, and later ones are: what recall brings back."""

import argparse
import itertools
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.recall.likelihood import Judge, Likelihood
from bench.recall.texts import windows
from pyramidserve.types import ChatMessage, Compression, Stopping
from workers.engine.engine import Engine, EngineConfig, EngineRequest
from workers.model.tokenizer import Tokenizer

NAMES = (
    *("Anna", "Boris", "Clara", "David", "Emma", "Felix", "Greta", "Hugo"),
    *("Irene", "Jonas", "Karin", "Leo", "Maria", "Nils", "Olga", "Peter"),
)
THINGS = (
    *("key", "map", "ring", "clock", "violin", "diary", "lamp"),
    *("coat", "telescope", "passport", "camera", "sword", "kettle", "globe"),
)
PLACES = (
    *("Lisbon", "Cairo", "Oslo", "Vienna", "Madrid", "Tokyo", "Boston"),
    *("Dublin", "Athens", "Prague", "Geneva", "Havana", "Delhi", "Rome"),
)
FACTS, LATER_TURNS = 12, 4
FIRST_QUESTION = "What is this text about? Answer in one sentence."
# A question is counted where the document makes the answer likelier by so much, in nats, to the full cache.
LEAST_GAIN = 0.5


@dataclass(frozen=True)
class Fact:
    """Somebody keeps something somewhere."""

    name: str
    thing: str
    place: str

    @property
    def sentence(self) -> str:
        return f" {self.name} keeps the {self.thing} in {self.place}."

    @property
    def question(self) -> str:
        return f"Where does {self.name} keep the {self.thing}?"

    @property
    def answer(self) -> tuple[str, str]:
        """What is given of it, and what is wanted."""
        return f"{self.name} keeps the {self.thing} in", f" {self.place}"


@dataclass(frozen=True)
class Talk:
    """A document with facts, and those that are asked about in later turns."""

    document: str
    asked: tuple[Fact, ...]


def talks(tokenizer: Tokenizer, tokens: int, count: int, seed: int) -> list[Talk]:
    """Documents of about ``tokens`` tokens, facts planted behind sentences all over them."""
    draw = random.Random(seed)
    made = []
    for text in windows(tokenizer, tokens, count):
        facts = [
            Fact(*each)
            for each in zip(
                draw.sample(NAMES, FACTS),
                draw.sample(THINGS, FACTS),
                draw.sample(PLACES, FACTS),
                strict=True,
            )
        ]
        words = tokenizer.decode(text).split(" ")
        for fact, at in zip(
            facts, sorted(draw.sample(range(len(words)), FACTS), reverse=True), strict=True
        ):
            words[at] += "." + fact.sentence
        made.append(Talk(" ".join(words), tuple(draw.sample(facts, LATER_TURNS))))
    return made


class Asking:
    """Holds talks with an engine, the same words in every mode."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._judge = engine, Judge(engine)
        self._tokenizer = engine.tokenizer

    def begin(self, document: str) -> tuple[list[int], list[int]]:
        """The ids of a first question about a document, and of the full cache's reply."""
        asked = f"{document}\n\n{FIRST_QUESTION}" if document else FIRST_QUESTION
        ids = self._tokenizer.chat([ChatMessage("user", asked)])
        (reply,) = self._engine.generate([EngineRequest(ids, stopping=Stopping(max_tokens=32))])
        return ids, [token for token in reply.token_ids if not self._tokenizer.decode_special(token)]

    def ask(
        self, ids: list[int], reply: list[int], facts: tuple[Fact, ...], compression: Compression
    ) -> list[dict[str, Any]]:
        """A talk: the first turn, then a question about each of ``facts``. What became of the answers."""
        session = "" if compression.policy == "full" else "talk"
        self._judge.read(ids, reply, compression, session)
        answers = []
        for fact in facts:
            given, wanted = map(self._tokenizer.encode_part, fact.answer)
            turn = f"<|im_end|>\n<|im_start|>user\n{fact.question}<|im_end|>\n<|im_start|>assistant\n"
            ids = [*ids, *reply, *self._tokenizer.encode_part(turn)]
            reply = [*given, *wanted]
            answers.append(_answer(self._judge.read(ids, reply, compression, session), reply, len(given)))
        self._engine.end_session("talk")
        return answers


def _answer(read: Likelihood, reply: list[int], given: int) -> dict[str, Any]:
    return {
        "log_probability": round(sum(read.log_probabilities[given:]), 4),
        "exact": list(read.likeliest[given:]) == reply[given:],
        "device_share": round(read.receipt.kv_keep_reached, 4),
        "reused": round(read.receipt.reused_tokens / read.receipt.prompt_tokens, 4),
        "recalled_bytes": read.receipt.recalled_bytes,
    }


def main() -> None:
    """Prints a table and writes the raw numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--talks", type=int, default=80, metavar="N")
    parser.add_argument("--tokens", type=int, default=1200, metavar="N", help="of a document")
    parser.add_argument("--kv-keep", type=float, default=0.45)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    engine = Engine(
        EngineConfig(dtype=arguments.dtype, kv_bytes=1 << 30, host_bytes=1 << 30, max_sequences=1)
    )
    asking = Asking(engine)
    modes = {
        f"{prefill} {recall}": Compression("pyramid", prefill, arguments.kv_keep, recall=recall)
        for prefill, recall in itertools.product(("evict", "prune"), ("off", "turn"))
    }
    results: dict[str, list[dict[str, Any]]] = {mode: [] for mode in ("no document", "full", *modes)}
    held = talks(engine.tokenizer, arguments.tokens, arguments.talks, arguments.seed)
    for number, talk in enumerate(held, 1):
        without, said = asking.begin("")
        results["no document"] += asking.ask(without, said, talk.asked, Compression())
        ids, reply = asking.begin(talk.document)
        for mode, compression in {"full": Compression(), **modes}.items():
            results[mode] += asking.ask(ids, reply, talk.asked, compression)
        print(f"\r{number} of {len(held)} talks", end="", flush=True)
    print()
    report(results, arguments.seed)
    if arguments.output:
        columns = {
            mode: {name: [each[name] for each in own] for name in own[0]} for mode, own in results.items()
        }
        arguments.output.write_text(json.dumps(columns) + "\n")


def report(results: dict[str, list[dict[str, Any]]], seed: int) -> None:
    """Prints how far each mode closes the gap to ``full``, where the document helps with the answer."""
    scores = {mode: [each["log_probability"] for each in own] for mode, own in results.items()}
    pairs = zip(scores["full"], scores["no document"], strict=True)
    counted = [i for i, (full, without) in enumerate(pairs) if full - without >= LEAST_GAIN]
    print(f"{len(counted)} of {len(scores['full'])} questions are counted")
    for mode, own in results.items():
        kept = [own[i] for i in counted]
        mean = {name: sum(each[name] for each in kept) / len(kept) for name in kept[0]}
        line = (
            f"{mode:12} log-probability {mean['log_probability']:+.3f}, exact {mean['exact']:.1%}, "
            f"KV on the device {mean['device_share']:.2f}, reused {mean['reused']:.1%}, "
            f"{mean['recalled_bytes'] / 2**20:.1f} MiB recalled a turn"
        )
        if mode.endswith("turn"):
            off = scores[mode.replace("turn", "off")]
            gaps = [(scores["full"][i] - off[i], scores[mode][i] - off[i]) for i in counted]
            share, low, high = recovered(gaps, seed)
            line += f"; recovers {share:.1%} of the gap [{low:.1%}, {high:.1%}]"
        print(line)


def recovered(gaps: list[tuple[float, float]], seed: int) -> tuple[float, float, float]:
    """Of pairs of a gap and what of it is closed, the share that is, with a bootstrap 95 % interval."""
    draw = random.Random(seed)

    def share(pairs: list[tuple[float, float]]) -> float:
        return sum(closed for _, closed in pairs) / sum(gap for gap, _ in pairs)

    again = sorted(share(draw.choices(gaps, k=len(gaps))) for _ in range(2000))
    return share(gaps), again[49], again[1949]


if __name__ == "__main__":
    main()
