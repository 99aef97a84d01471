"""Gates of a model, trained on what it looks at when it repeats a text."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from pyramidserve.types import Compression, Stopping
from workers.budget.observation import RowAttention
from workers.budget.plan import KeepPlan
from workers.engine.engine import Engine, EngineRequest
from workers.policies.defensive import added
from workers.policies.gates import Gates, features
from workers.policies.kvzap import SINKS
from workers.policies.observed import Observed, ends
from workers.policies.policy import Policy, Target, knob
from workers.policies.registry import POLICIES

# What is said between a text and its repetition.
REPEAT = "\n\nRepeat the previous text exactly:\n\n"
SESSION = "repeated"
# What is added to each feature's variance, which is 1.
RIDGE = 1e-2
# Added to what is wanted, so that its logarithm is finite.
LEAST = 1e-9


@dataclass(frozen=True)
class _Knobs:
    read: int = knob(1, "[1, ...)", "tokens of the text; a longer prompt repeats them")


def _plan(target: Target, knobs: _Knobs) -> KeepPlan:
    """All of the text stays; behind it there is a choice, which the policy is asked for."""
    kept = target.prompt_tokens - (target.prompt_tokens > knobs.read)
    worst = RowAttention(rows=None, over_rows="max")
    return KeepPlan(target.prompt_tokens, (kept,) * target.layers, recent=1, observes=worst, heads="each")


class Training:
    """Has an engine read texts and repeat them, and fits gates to the attention that they get from that.

    The score is KVzip's (Kim et al., arXiv 2505.23416): the most that any row of the repetition pays a
    token, by the most attentive query head of a KV head; times what its value adds to the output. Gates
    are the least squares of its logarithm, with a ridge.

    Attributes:
        products: sums of products of features, and of what is wanted, the last, of all tokens that were
            read, fp64 [layers, KV heads, features + 1, features + 1].
    """

    def __init__(self, engine: Engine) -> None:
        """``engine`` has one shard, and room for a text and its repetition."""
        self._engine, self._model = engine, engine.model
        self._layer, self._read = 0, 0
        size = features(torch.zeros(1, 2, self._model.head_size)).shape[1] + 1
        sizes = (self._model.layers, self._model.kv_heads, size, size)
        self.products = torch.zeros(sizes, dtype=torch.float64)

    def read(self, texts: Sequence[Sequence[int]], say: Callable[[str], None]) -> None:
        """Takes in texts."""
        between = self._engine.tokenizer.encode_part(REPEAT)
        for number, text in enumerate(texts, 1):
            policy = Policy("repeated", "1", "looks at a repetition", _Knobs, _plan, self._choose)
            asked = Compression(policy.name, parameters={"read": len(text)})
            POLICIES[policy.name] = policy
            self._layer, self._read = 0, len(text)
            for prompt in (text, [*text, *between, *text]):
                once = EngineRequest(
                    prompt, stopping=Stopping(max_tokens=1), compression=asked, session_id=SESSION
                )
                (reply,) = self._engine.generate([once])
            if reply.receipt.reused_tokens < len(text):
                raise RuntimeError(f"a text of {len(text)} tokens was read again, not repeated")
            self._engine.end_session(SESSION)
            del POLICIES[policy.name]
            say(f"text {number} of {len(texts)} was read and repeated")

    def _choose(self, observed: Observed, tokens: int, keep: int, knobs: _Knobs) -> torch.Tensor:
        """Takes in one layer's keys and values, and what attention they get; not to be chosen by."""
        assert observed.kv is not None
        assert observed.attention is not None
        # The first tokens stay in any case, so that nothing is learnt of them.
        kv, own = observed.kv[: self._read], slice(SINKS, self._read)
        wanted = (observed.attention[:, : self._read] * added(observed, self._read) + LEAST).log()
        for head, products in enumerate(self.products[self._layer]):
            rows = torch.cat((features(kv[own, :, head]), wanted[head, own, None]), dim=1).double().cpu()
            products += rows.T @ rows
        self._layer += 1
        return ends(observed, tokens, keep, knobs)

    def gates(self) -> Gates:
        """Of all that was read."""
        return Gates(self._model.fingerprint, least_squares(self.products).float().numpy())


def least_squares(products: torch.Tensor) -> torch.Tensor:
    """Weights [..., features] by sums of products [..., features + 1, features + 1], what is wanted last.

    Features are scaled to a variance of 1 before the ridge is added; the last of them is 1.
    """
    count = products[..., -2, -2, None]
    mean = products[..., -2, :] / count
    covariance = products / count[..., None] - mean[..., :, None] * mean[..., None, :]
    wanted, own = covariance[..., :-2, -1], covariance[..., :-2, :-2]
    scale = own.diagonal(dim1=-2, dim2=-1).clamp(min=LEAST).sqrt()
    ridge = RIDGE * torch.eye(own.shape[-1], dtype=own.dtype)
    scaled = own / (scale[..., :, None] * scale[..., None, :]) + ridge
    weights = torch.linalg.solve(scaled, wanted / scale) / scale
    constant = mean[..., -1] - (weights * mean[..., :-2]).sum(dim=-1)
    return torch.cat((weights, constant[..., None]), dim=-1)
