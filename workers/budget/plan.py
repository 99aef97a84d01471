"""What a policy keeps, as counts. Counts depend on lengths alone, so memory is known in advance."""

from dataclasses import dataclass, replace

# Keys that an index has in a row of the pool, which holds the key and value of one token.
KEYS_PER_ROW = 16
# What the index of a token's key takes of its KV.
INDEX_SHARE = 1 / KEYS_PER_ROW


@dataclass(frozen=True)
class GenerationPlan:
    """Compression of generated tokens, in chunks (arXiv 2405.12532, section 3.3).

    Each time ``chunk`` more generated tokens have left the newest ``window`` generated ones, layer l
    looks at the ``chunk`` cache slots from ``start[l] + chunks so far * keeps[l]`` on and keeps the
    ``keeps[l]`` that the recent window attends to most.
    """

    chunk: int
    window: int
    start: tuple[int, ...]
    keeps: tuple[int, ...]

    def chunks(self, generated: int) -> int:
        """Chunks compressed once ``generated`` tokens are in the cache."""
        return max(0, generated - self.window) // self.chunk

    def until_chunk(self, generated: int) -> int:
        """Tokens that may follow ``generated`` ones until the next chunk is compressed behind the last."""
        return self.window + (self.chunks(generated) + 1) * self.chunk - generated

    @property
    def scores(self) -> bool:
        """Whether attention must be accumulated to choose what stays."""
        return any(self.keeps)


@dataclass(frozen=True)
class KeepPlan:
    """How many tokens of one sequence each layer of the model keeps on the device.

    Attributes:
        prompt_tokens: tokens of the prompt.
        kept: per layer, prompt tokens whose KV stays; the last ``recent`` always.
        recent: newest prompt tokens, whose attention scores the rest.
        sinks: first tokens that always stay, or as many of them as a layer keeps beside the recent.
        distance_weight: weight of the newest scoring row; the oldest weighs 1.
        drops_hidden_states: layer l+1 computes only the ``kept[l+1]`` tokens chosen in layer l.
        generation: compression of generated tokens, if any.
        bound_by: what kept the kept fraction above its target, or "".
        drafts: tokens that are generated ahead of their verification, at most.
        spills_all: whatever is not on the device must be on the host.
        spills_hidden: hidden states that are dropped go to the host.
        indexes: the keys of what is on the host have an index on the device.
    """

    prompt_tokens: int
    kept: tuple[int, ...]
    recent: int
    sinks: int = 0
    distance_weight: float = 1.0
    drops_hidden_states: bool = False
    generation: GenerationPlan | None = None
    bound_by: str = ""
    drafts: int = 0
    spills_all: bool = False
    spills_hidden: bool = False
    indexes: bool = False

    @property
    def fraction(self) -> float:
        """Memory that the prompt takes of the device, as a fraction of its KV, summed over layers."""
        whole = len(self.kept) * self.prompt_tokens
        return sum(self.kept) / whole + self.indexes * INDEX_SHARE * (1 - sum(self.kept) / whole)

    @property
    def lag(self) -> int:
        """Tokens that a step may verify at once, so that compression is late by as many."""
        return self.drafts + 1 if self.drafts else 0

    def keeping(self, layer: int, kept: int) -> "KeepPlan":
        """The plan where ``layer`` turns out to keep ``kept`` tokens of the prompt."""

        def changed(counts: tuple[int, ...], count: int) -> tuple[int, ...]:
            return (*counts[:layer], count, *counts[layer + 1 :])

        generation = self.generation
        # Chunks follow the prompt, or what of it always stays.
        if generation is not None and generation.start[layer] == self.kept[layer]:
            generation = replace(generation, start=changed(generation.start, kept))
        return replace(self, kept=changed(self.kept, kept), generation=generation)

    def tokens(self, layer: int, generated: int) -> int:
        """Tokens in ``layer``'s cache with ``generated`` tokens fed, compression done."""
        if self.generation is None:
            return self.kept[layer] + generated
        plan = self.generation
        chunks = plan.chunks(generated)
        return self.kept[layer] + generated - chunks * (plan.chunk - plan.keeps[layer])
