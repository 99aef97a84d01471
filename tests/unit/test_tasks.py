"""Generated tasks hold what is asked of them, and are as long as they are to be."""

from random import Random

import pytest

from pyramidserve.chat import Chat
from pyramidserve.errors import InvalidRequestError
from workers.bench.tasks import COMMON, HOPS, KINDS, LEAST, items


class Letters:
    """A tokenizer of letters."""

    def encode_part(self, text: str) -> list[int]:
        return list(map(ord, text))

    def chat(self, chat: Chat) -> list[int]:
        return self.encode_part(f"<{chat.messages[0].content}>")

    def decode(self, ids: tuple[int, ...]) -> str:
        return "".join(map(chr, ids))


LETTERS = Letters()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [LEAST, 150])
def test_the_answer_is_in_the_context_and_not_in_the_question(kind: str, size: int) -> None:
    task = KINDS[kind](Random(1), size)
    assert task == KINDS[kind](Random(1), size)
    for word in task.answer.replace(" and ", " ").strip().split(", "):
        assert word.strip() in task.context
        assert word.strip() not in task.question + task.begins


def test_variables_are_a_chain_in_order_and_common_words_are_the_most_common() -> None:
    chain = KINDS["vt"](Random(2), 200)
    names = chain.answer.replace(", and ", ", ").strip().split(", ")
    assert len(names) == HOPS + 1
    places = [chain.context.index(f"VAR {name} = ") for name in names]
    assert places == sorted(places)
    listed = KINDS["cwe"](Random(2), 200)
    words = listed.context.split("\n")[1].split()[1::2]
    common = listed.answer.replace(", and ", ", ").strip().split(", ")
    assert len(common) == COMMON
    assert min(map(words.count, common)) > max(words.count(word) for word in set(words) - set(common))
    coded = KINDS["fwe"](Random(2), 200)
    frequent = coded.answer.replace(", and ", ", ").strip().split(", ")
    counts = [coded.context.split().count(word) for word in frequent]
    assert counts == sorted(counts, reverse=True)


def test_items_are_nearly_as_long_as_asked_and_part_where_the_question_begins() -> None:
    made = items(LETTERS, [3000, 6000], 2)  # type: ignore[arg-type]
    assert len({each.name for each in made}) == len(made) == 2 * len(KINDS) * 2
    for item in made:
        tokens = int(item.name.split()[1])
        assert 0.9 * tokens < len(item.prompt_ids) <= tokens
        context = LETTERS.decode(item.prompt_ids[: item.context_tokens])
        rest = LETTERS.decode(item.prompt_ids[item.context_tokens :])
        assert rest.startswith("\n\n")
        assert LETTERS.decode(item.question_ids) == f"<{rest.strip()}"
        assert context.startswith("<")


def test_a_length_that_is_too_short_is_refused_by_the_kind_that_takes_more() -> None:
    with pytest.raises(InvalidRequestError, match=r"--task-prompts has 90; the least of niah_single takes"):
        items(LETTERS, [90], 1)  # type: ignore[arg-type]
