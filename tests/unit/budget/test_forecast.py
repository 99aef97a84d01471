"""The most that sequences will take together, against a simulation token by token."""

import math
from collections.abc import Hashable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyramidserve.types import Compression
from workers.budget.footprint import ShardLayout, pages_held, peak_pages
from workers.budget.forecast import Forecast, Growth, growth
from workers.budget.pages import IntegrityError
from workers.policies.registry import plan

SHARDS = (ShardLayout(0, 2, 4096), ShardLayout(2, 5, 4096))


@st.composite
def growths(draw: st.DrawFn) -> tuple[Growth, int]:
    """A growth, and how far it has come."""
    first = draw(st.tuples(st.integers(0, 20), st.integers(0, 20)))
    expected_tokens = draw(st.integers(0, 30))
    most_tokens = expected_tokens + draw(st.integers(0, 30))
    slope = draw(st.tuples(st.integers(0, 3), st.integers(0, 3)))

    def grown(tokens: int) -> tuple[int, ...]:
        return tuple(f + s * tokens for f, s in zip(first, slope, strict=True))

    done = draw(st.integers(0, most_tokens))
    return Growth(first, grown(expected_tokens), expected_tokens, grown(most_tokens), most_tokens), done


def _simulated(wanted: Sequence[tuple[Growth, int]]) -> list[float]:
    """The peaks of a run in which every sequence gets a token a step until its end."""
    peaks = [0.0, 0.0]
    for step in range(100):
        total = [0.0, 0.0]
        for more, done in wanted:
            late = done >= more.expected_tokens
            end, last = (more.most_tokens, more.most) if late else (more.expected_tokens, more.expected)
            if done + step > end:
                continue
            for rank in range(2):
                slope = (last[rank] - more.first[rank]) / max(1, end)
                total[rank] += more.first[rank] + slope * (done + step)
        peaks = [max(pair) for pair in zip(peaks, total, strict=True)]
    return peaks


@given(st.lists(growths(), max_size=8))
def test_the_peak_is_that_of_a_run(wanted: list[tuple[Growth, int]]) -> None:
    forecast = Forecast((1, 1), 8)
    for key, (more, _) in enumerate(wanted):
        forecast.add(key, more)
    for key, (_, done) in enumerate(wanted):
        forecast.advance(key, done)
    assert forecast.peak() == tuple(math.ceil(pages - 1e-6) for pages in _simulated(wanted))


@given(st.lists(growths(), max_size=6), growths())
def test_what_fits_is_what_leaves_the_peak_within_the_pools(
    wanted: list[tuple[Growth, int]], more: tuple[Growth, int]
) -> None:
    pages = (60, 60)
    forecast = Forecast(pages, 7)
    for key, (each, done) in enumerate(wanted):
        forecast.add(key, each, done)
    expected = all(p <= total + 1e-9 for p, total in zip(_simulated([*wanted, more]), pages, strict=True))
    assert forecast.fits(*more) == expected


@given(st.lists(st.tuples(growths(), st.booleans()), max_size=8))
def test_nothing_is_left_of_those_that_are_removed(wanted: list[tuple[tuple[Growth, int], bool]]) -> None:
    forecast, rest = Forecast((1, 1), 8), []
    for key, ((more, done), _) in enumerate(wanted):
        forecast.add(key, more, done)
    for key, ((more, done), stays) in enumerate(wanted):
        if stays:
            rest.append((more, done))
        else:
            forecast.remove(key)
    assert forecast.peak() == tuple(math.ceil(pages - 1e-6) for pages in _simulated(rest))
    assert forecast.promised.tolist() == [sum(more.expected[rank] for more, _ in rest) for rank in range(2)]
    assert [key in forecast for key in range(len(wanted))] == [stays for _, stays in wanted]


@given(st.lists(growths(), max_size=6), growths(), st.sampled_from((0.0, 0.5, 1.0)))
def test_what_is_in_the_way_is_no_more_than_must_end(
    wanted: list[tuple[Growth, int]], more: tuple[Growth, int], horizon: float
) -> None:
    forecast = Forecast((60, 60), 7, horizon)
    for key, (each, done) in enumerate(wanted):
        forecast.add(key, each, done)
    leaving = forecast.in_the_way(more[0])
    rest = forecast.without(leaving)
    assert len(rest) == len(forecast) - len(leaving)
    assert rest.fits(more[0]) or not rest
    if leaving:
        # The last of them is the one that goes on for the longest.
        counted: dict[Hashable, int] = {
            key: (each.most_tokens if done >= each.expected_tokens else each.expected_tokens) - done
            for key, (each, done) in enumerate(wanted)
        }
        last = max(counted[key] for key in leaving)
        assert horizon == 0 or all(counted[key] >= last for key in counted if key not in leaving)
        assert any(not forecast.without(leaving - {key}).fits(more[0]) for key in leaving)


def test_a_shorter_horizon_counts_less_growth() -> None:
    more = Growth((1,), (11,), 10, (11,), 10)
    for horizon, peak in ((1.0, 22), (0.5, 12), (0.0, 2)):
        forecast = Forecast((99,), 2, horizon)
        forecast.add("a", more)
        forecast.add("b", more)
        assert forecast.peak() == (peak,)
        forecast.advance("a", 10)
        forecast.advance("b", 10)
        assert forecast.peak() == (22,)


@given(growths(), growths(), st.lists(growths(), max_size=4))
def test_what_covers_one_that_has_no_room_has_none(
    some: tuple[Growth, int], other: tuple[Growth, int], there: list[tuple[Growth, int]]
) -> None:
    forecast = Forecast((60, 60), 5)
    for key, (each, done) in enumerate(there):
        forecast.add(key, each, done)
    assert some[0].covers(some[0]) == (some[0].expected_tokens > 0)
    if some[0].covers(other[0]) and not forecast.fits(other[0]):
        assert not forecast.fits(some[0])


def test_more_fit_when_they_end_at_different_times() -> None:
    more = Growth((1,), (11,), 10, (11,), 10)
    forecast = Forecast((16,), 8)
    forecast.add("a", more)
    assert not forecast.fits(more)
    forecast.advance("a", 6)
    assert forecast.fits(more)
    assert forecast.peak() == (11,)


def test_one_that_outlives_its_expected_end_is_counted_to_its_latest() -> None:
    forecast = Forecast((99,), 1)
    forecast.add("a", Growth((1,), (3,), 2, (11,), 10))
    assert forecast.peak() == (3,)
    forecast.advance("a", 2)
    assert forecast.peak() == (11,)


def test_sequences_are_bounded() -> None:
    more = Growth((0,), (0,), 1, (0,), 1)
    forecast = Forecast((9,), 1)
    forecast.add("a", more)
    assert forecast.full
    assert not forecast.fits(more)
    for key in ("a", "b"):
        with pytest.raises(IntegrityError, match="cannot be added"):
            forecast.add(key, more)
    forecast.remove("a")
    assert len(forecast) == 0
    assert "a" not in forecast
    assert forecast.fits(more)
    assert forecast.peak() == (0,)


def test_a_plan_grows_from_its_prompt_to_its_peaks() -> None:
    keep = plan(Compression("pyramid", kv_keep=0.6), 200, 5)
    assert growth(keep, SHARDS, 50, 120) == Growth(
        first=tuple(pages_held(keep, shard, 0) for shard in SHARDS),
        expected=tuple(peak_pages(keep, shard, 50) for shard in SHARDS),
        expected_tokens=49,
        most=tuple(peak_pages(keep, shard, 120) for shard in SHARDS),
        most_tokens=119,
    )


@pytest.mark.parametrize(("pages", "holds"), [((9, 9), True), ((8, 9), False), ((9, 8), False)])
def test_what_could_ever_be_held_fits_at_its_latest_end(pages: tuple[int, int], holds: bool) -> None:
    assert Forecast(pages, 1).could_ever_hold(Growth((1, 1), (2, 2), 1, (9, 9), 9)) == holds
