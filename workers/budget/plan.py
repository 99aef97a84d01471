"""What a policy keeps, as counts. Counts depend on lengths alone, so memory is known in advance."""

from dataclasses import dataclass, replace

from workers.budget.observation import Heads, KeysValues, Observation, RowAttention

# What the index of a token's key takes of its KV in 16 bits, or in 32.
INDEX_SHARE = 1 / 16


@dataclass(frozen=True)
class GenerationPlan:
    """Compression of generated tokens, in chunks (arXiv 2405.12532, section 3.3).

    Each time ``chunk`` more generated tokens have left the newest ``window`` generated ones, layer l
    looks at the ``chunk`` cache slots from ``start[l] + chunks so far * keeps[l]`` on and keeps
    ``keeps[l]`` of them. Or, with ``rechooses``, it looks at all that it has and drops as many.

    Attributes:
        observes: what the choice among them looks at; None: nothing. Counts of rows are for choices among
            all; the most that a row pays is of a prompt's rows alone.
        rechooses: what has stayed, of the prompt too, may go later; ``keeps`` are then 0.
        recent: newest tokens that always stay when all are looked at; else 0.
        sinks: first slots that always do; else 0.
    """

    chunk: int
    window: int
    start: tuple[int, ...]
    keeps: tuple[int, ...]
    observes: RowAttention | KeysValues | None = None
    rechooses: bool = False
    recent: int = 0
    sinks: int = 0

    def __post_init__(self) -> None:
        """Raises ValueError where steps cannot gather what is to be looked at."""
        if isinstance(self.observes, RowAttention) and self.observes.over_rows == "max":
            raise ValueError(
                "over_rows is 'max' while tokens are generated; it must be 'sum' or 'low' then"
            )

    def chunks(self, generated: int) -> int:
        """Chunks compressed once ``generated`` tokens are in the cache."""
        return max(0, generated - self.window) // self.chunk

    def until_chunk(self, generated: int) -> int:
        """Tokens that may follow ``generated`` ones until the next chunk is compressed behind the last."""
        return self.window + (self.chunks(generated) + 1) * self.chunk - generated

    @property
    def accumulates(self) -> RowAttention | None:
        """The attention that must be accumulated to choose what stays."""
        return self.observes if isinstance(self.observes, RowAttention) else None


@dataclass(frozen=True)
class KeepPlan:
    """How many tokens of one sequence each layer of the model keeps on the device.

    Attributes:
        prompt_tokens: tokens of the prompt.
        kept: per layer, prompt tokens whose KV stays; the last ``recent`` always.
        recent: newest prompt tokens that always stay.
        sinks: first tokens that always stay, or as many of them as a layer keeps beside the recent.
        observes: what the choice of the others looks at; None: nothing.
        heads: whose choices are made: of each KV head, which then holds tokens of its own, or one for all.
        drops_hidden_states: layer l+1 computes only the ``kept[l+1]`` tokens chosen in layer l.
        generation: compression of generated tokens, if any.
        bound_by: what kept the kept fraction above its target, or "".
        drafts: tokens that are generated ahead of their verification, at most.
        spills_all: whatever is not on the device must be on the host.
        spills_hidden: hidden states that are dropped go to the host.
        indexes: the keys of what is on the host have an index on the device.
        within_cache: tokens are at their places within the cache, not within the text, as if there were
            none but those that stay: ``generation.sinks`` first ones, and the newest without a gap.
    """

    prompt_tokens: int
    kept: tuple[int, ...]
    recent: int
    sinks: int = 0
    observes: Observation | None = None
    heads: Heads = "mean"
    drops_hidden_states: bool = False
    generation: GenerationPlan | None = None
    bound_by: str = ""
    drafts: int = 0
    spills_all: bool = False
    spills_hidden: bool = False
    indexes: bool = False
    within_cache: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError where there is not one place within the cache for each token."""
        if self.within_cache and (self.heads == "each" or self.drops_hidden_states):
            raise ValueError(
                "within_cache is True, but heads have tokens of their own, or hidden states are dropped; "
                "keep the same tokens for all heads, and evict"
            )

    @property
    def fraction(self) -> float:
        """Memory that the prompt takes of the device, as a fraction of its KV, summed over layers."""
        whole = len(self.kept) * self.prompt_tokens
        return sum(self.kept) / whole + self.indexes * INDEX_SHARE * (1 - sum(self.kept) / whole)

    def chooses(self, kept: int) -> bool:
        """Whether there is a choice where ``kept`` tokens of a prompt stay: more than stay in any case."""
        return self.recent + self.sinks < kept

    def sets(self, kv_heads: int) -> int:
        """Sets of tokens that a layer holds, each for its KV heads."""
        return kv_heads if self.heads == "each" else 1

    @property
    def remembers(self) -> bool:
        """Whether the attention that a prompt's tokens have got counts in later choices too."""
        generation, observes = self.generation, self.observes
        return (
            generation is not None
            and generation.rechooses
            and isinstance(observes, RowAttention)
            and observes.rows is None
        )

    @property
    def score_base(self) -> int:
        """Where the scores of generated tokens begin; those of prompts end there."""
        return max(self.kept) if self.generation is not None and self.generation.rechooses else 0

    def shared(self, rows: int, generated: int) -> int:
        """Newest tokens that every KV head has on the device.

        Args:
            rows: of the prompt that were computed, not found.
            generated: tokens that were fed behind it.
        """
        generation = self.generation
        if self.heads != "each":
            return self.prompt_tokens + generated
        if generation is None or not generation.chunks(generated):
            return min(self.recent, rows) + generated
        if generation.rechooses:
            return generation.recent
        return generated - generation.chunks(generated) * generation.chunk

    @property
    def accumulates_each(self) -> bool:
        """Whether attention to generated tokens is kept for each KV head."""
        return self.heads != "mean"

    @property
    def score_width(self) -> int:
        """Tokens of a layer whose attention is accumulated while tokens are generated, at most."""
        generation = self.generation
        if generation is None or generation.accumulates is None:
            return 0
        drafts = self.lag if generation.rechooses else 0  # else they may go beyond what is scored
        return self.score_base + drafts + generation.window + generation.chunk

    @property
    def lag(self) -> int:
        """Tokens that a step may verify at once, so that compression is late by as many."""
        return self.drafts + 1 if self.drafts else 0

    @property
    def held(self) -> int:
        """The most tokens of a layer at once, once the prompt is prefilled, where more go as they come."""
        generation = self.generation
        return max(self.kept) + (0 if generation is None else generation.window + generation.chunk)

    @property
    def moved_sinks(self) -> int:
        """First tokens that come nearer to the newest as those between them go."""
        return self.generation.sinks if self.within_cache and self.generation is not None else 0

    def rotated_length(self, length: int) -> int:
        """How long a sequence of at most ``length`` tokens is to its rotation."""
        return min(length, max(self.prompt_tokens, self.held)) if self.within_cache else length

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
