"""Paged moments on torch tensors: the reference's faults and evictions under any interleaving, and its bits."""

import copy
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, multiple, rule, run_state_machine_as_test

from minift.optim import adamw8bit as reference_8bit
from minift.optim.paged import PagedAdamW as ReferencePaged
from minift.optim.pager import Pager as ReferencePager
from minift_kernels.optim.adamw import AdamW
from minift_kernels.optim.adamw8bit import AdamW8bit, zero_moments
from minift_kernels.optim.paged import PagedAdamW
from minift_kernels.optim.pager import Pager
from minift_kernels.quant.blockwise import BlockwiseTensor
from nn.checks import kill_matrix

SIZES = (8, 24, 40, 8, 100, 1, 64, 33, 101)  # bytes of a page


class Both:
    """The reference's pager and ours, to which the same is done."""

    def __init__(self, make, budget):
        self.theirs, self.ours = ReferencePager(budget), make(budget)
        self.pages = 0

    def agree(self, action, same_action):
        """Both do it, or both refuse with the same words; what they return."""
        results = []
        for do in (action, same_action):
            try:
                results.append(do())
            except ValueError as error:
                results.append(str(error))
        assert isinstance(results[0], str) == isinstance(results[1], str), results
        if isinstance(results[0], str):
            assert results[0] == results[1]
        return results

    def add(self, size, fill):
        content = np.full(size, fill, np.uint8)
        number, _ = self.agree(lambda: self.theirs.add(content), lambda: self.ours.add(torch.tensor(content)))
        if not isinstance(number, str):
            self.pages += 1
        self.check()

    def use(self, numbers, value, inside=()):
        """Pages open inside each other, each changed while all are open; those of `inside` open and close in turn."""
        with ExitStack() as stack:
            opened = []
            for number in numbers:
                entered = self.agree(
                    *(lambda p=p, n=number: stack.enter_context(p.page(n)) for p in (self.theirs, self.ours))
                )
                if not isinstance(entered[0], str):
                    opened.append(entered)
                self.check()
            for one, other in opened:
                assert one.tobytes() == other.numpy().tobytes(), "other bytes than the reference"
                one[value % one.size] = other[value % one.size] = value
            for number in inside:
                self.use([number], value + 1)
            for one, other in opened:
                assert one.tobytes() == other.numpy().tobytes(), "a page changed with another"
        self.check()

    def limit(self, budget):
        self.agree(lambda: self.theirs.limit(budget), lambda: self.ours.limit(budget))
        self.check()

    def check(self):
        assert self.ours.counts == self.theirs.counts, f"{self.ours.counts}, needed {self.theirs.counts}"
        assert repr(self.ours) == repr(self.theirs)
        assert list(self.ours._resident) == list(self.theirs._resident), "others are resident, or in another order"
        assert sum(page.nbytes for page in self.ours._resident.values()) == self.ours.resident_bytes
        for number in range(self.pages):
            assert self.ours.peek(number).numpy().tobytes() == self.theirs.peek(number).tobytes(), f"page {number}"


class Machine(RuleBasedStateMachine):
    pages = Bundle("pages")
    some = st.lists(pages, max_size=4)

    def __init__(self):
        super().__init__()
        self.both = Both(Pager, 100)

    @rule(target=pages, size=st.sampled_from(SIZES), fill=st.integers(0, 255))
    def add(self, size, fill):
        before = self.both.pages
        self.both.add(size, fill)
        return multiple(*range(before, self.both.pages))

    @rule(numbers=some, inside=some, value=st.integers(0, 254))
    def use(self, numbers, inside, value):
        self.both.use(numbers, value, inside)

    @rule(budget=st.integers(0, 150))
    def limit(self, budget):
        self.both.limit(budget)

    @invariant()
    def agree(self):
        self.both.check()


def test_any_interleaving_is_the_references():
    """Adds, uses inside uses, smaller and larger budgets, in any order."""
    run_state_machine_as_test(Machine, settings=settings(max_examples=40, stateful_step_count=20, deadline=None))


def any_use(make, seed):
    rng, both = np.random.default_rng(seed), Both(make, 120)
    for i, size in enumerate(SIZES[:8]):
        both.add(size, i)
    for _ in range(15):
        first, *others = (int(n) for n in rng.integers(8, size=5))
        both.use([first, *others[:2]], int(rng.integers(255)), inside=others)


def any_budget(make, seed):
    rng, both = np.random.default_rng(seed), Both(make, 300)
    for i, size in enumerate(SIZES):
        both.add(size, i)
    for budget in rng.integers(100, 301, size=12):
        both.use([int(rng.integers(len(SIZES)))], int(rng.integers(255)))
        both.limit(int(budget))


class NeverWritesBack(Pager):
    """Takes every page for a clean one."""

    def _copy_out(self, number, page):
        pass


class EvictsTheNewest(Pager):
    def _evict_down_to(self, allowed):
        self._resident = type(self._resident)(reversed(self._resident.items()))
        super()._evict_down_to(allowed)
        self._resident = type(self._resident)(reversed(self._resident.items()))


class EvictsWhatIsInUse(Pager):
    def _evict_down_to(self, allowed):
        in_use, self._in_use = self._in_use, type(self._in_use)()
        super()._evict_down_to(allowed)
        self._in_use = in_use


class NeverEvicts(Pager):
    def _evict_down_to(self, allowed):
        pass


class SharesItsMemory(Pager):
    """A page is not copied in but handed out: what waits on the host changes with it, and is not what it costs."""

    def _copied_in(self, number):
        return self._host[0][: self._host[number].numel()]


class IgnoresTheBudget(Pager):
    def limit(self, budget):
        self._evict_down_to(budget)


def test_kill_matrix():
    for seed in range(2):
        any_use(Pager, seed)
        any_budget(Pager, seed)
    wrong = [NeverWritesBack, EvictsTheNewest, EvictsWhatIsInUse, NeverEvicts, SharesItsMemory, IgnoresTheBudget]
    kill_matrix([any_use, any_budget], wrong, range(2))


# --- the optimizer in pages -------------------------------------------------------------------------------------------

SHAPES = {"w": (30, 65), "small": (3, 5), "norm": (700,), "none": (0, 4)}
MAKERS = [
    lambda **state: AdamW(0.8, 0.95, 1e-3, 0.3, **state),
    lambda **state: AdamW8bit(0.8, 0.95, 1e-3, 0.3, block_size=64, min_8bit_size=100, **state),
]


def some(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for n, s in SHAPES.items()}


def parts(moments):
    """name -> the tensors of a moment."""
    return {n: (q.codes, q.absmax) if isinstance(q, BlockwiseTensor) else (q,) for n, q in moments.items()}


def same(found, wanted):
    found, wanted = parts(found), parts(wanted)
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert [t.dtype for t in found[name]] == [t.dtype for t in wanted[name]], name
        assert all(map(torch.equal, found[name], wanted[name])), name


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("how", ["torch", "interpreter"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
def test_paging_changes_no_bit(make, how, dtype):
    """With room for two pages; from a state that exists too."""
    if how == "interpreter" and dtype == torch.float64:
        return  # no kernel takes it
    plain, here, there = make(), some(0, dtype), some(0, dtype)
    page = 544 if isinstance(plain, AdamW8bit) else 2 * 256 * (8 if dtype == torch.float64 else 4)
    paged = PagedAdamW(make(), Pager(2 * page), 256)
    for step in (1, 2, 3):
        if step == 3:
            state = {"step": 2, "m": copy.deepcopy(plain.m), "v": copy.deepcopy(plain.v)}
            resumed, kept = PagedAdamW(make(**state), Pager(20_000), 512), copy.deepcopy(here)
            same(resumed.m, plain.m)
            assert (resumed.optimizer.m, resumed.optimizer.v) == ({}, {})
        gradients = some(step, dtype)
        plain.update(here, gradients, 0.05, backend=how)
        paged.update(there, gradients, 0.05, backend=how)
    resumed.update(kept, gradients, 0.05, backend=how)
    for one, arrays in ((paged, there), (resumed, kept)):
        same(arrays, here)
        same(one.m, plain.m)
        same(one.v, plain.v)
        assert (one.step, one.nbytes) == (3, plain.nbytes)
    assert paged.pager.counts["evictions"] > 10


def test_faults_are_the_references():
    """The same pages in the same order, from one page too few to all of them."""
    ours = PagedAdamW(MAKERS[1](), Pager(1200), 256)
    settings = {"block_size": 64, "min_8bit_size": 100}
    theirs = ReferencePaged(reference_8bit.AdamW8bit(0.8, 0.95, 1e-3, 0.3, **settings), ReferencePager(1200), 256)
    arrays = some(0)
    expected = {n: t.numpy().copy() for n, t in arrays.items()}
    for step, budget in enumerate((1200, 3000, 800, 9000, 9000), 1):
        gradients = some(step)
        for optimizer in (ours, theirs):
            optimizer.pager.limit(budget)
        ours.update(arrays, gradients, 0.05)
        theirs.update(expected, {n: g.numpy() for n, g in gradients.items()}, 0.05)
        assert ours.pager.counts == theirs.pager.counts
        for number in range(len(theirs.pager._places)):
            assert ours.pager.peek(number).numpy().tobytes() == theirs.pager.peek(number).tobytes(), number


def test_what_does_not_fit_is_refused_before_anything_moves():
    arrays, gradients = some(0), some(1)
    before = copy.deepcopy(arrays)
    with pytest.raises(ValueError, match="page_elements is 300, needed a multiple of 256"):
        PagedAdamW(AdamW8bit(), Pager(2000), 300)
    with pytest.raises(ValueError, match=r"a page of 2,080 bytes does not fit a budget of 2,000: raise the budget"):
        PagedAdamW(AdamW8bit(), Pager(2000), 1024).update({"w": torch.zeros(5000)}, {"w": torch.zeros(5000)}, 0.1)
    narrow, two = PagedAdamW(AdamW8bit(), Pager(2000), 1024), {"fits": torch.zeros(9), "w": torch.zeros(5000)}
    with pytest.raises(ValueError, match="raise the budget"):
        narrow.update(two, {n: torch.ones_like(t) for n, t in two.items()}, 0.1)
    assert narrow.step == 0 and not two["fits"].any()
    shorter = PagedAdamW(AdamW(step=1, m={"w": torch.zeros(3)}, v={"w": torch.zeros(3)}), Pager(2000))
    with pytest.raises(ValueError, match=r"the moments of w have shape \(3,\), needed \(2, 3\)"):
        shorter.update(two := {"w": torch.zeros(2, 3)}, {"w": torch.ones(2, 3)}, 0.1)
    assert shorter.step == 1 and not two["w"].any()
    long = PagedAdamW(AdamW8bit(block_size=8192), Pager(1 << 20))
    with pytest.raises(ValueError, match="block_size: 8,192, a kernel holds blocks of up to 4,096"):
        long.update(arrays, gradients, 0.1, backend="interpreter")
    assert long.step == 0
    m, v = zero_moments(torch.zeros(300), 64, 0)
    with pytest.raises(ValueError, match="the moments of w: another map than `zero_moments` has"):
        PagedAdamW(AdamW8bit(m={"w": v}, v={"w": v}, block_size=64), Pager(1 << 20), 256)
    with pytest.raises(ValueError, match="the moments of w: another map than `zero_moments` has"):
        PagedAdamW(AdamW8bit(m={"w": m}, v={"w": m}, block_size=64), Pager(1 << 20), 256)
    with pytest.raises(ValueError, match="the moments of w: blocks of 64, needed 256, as the optimizer has"):
        PagedAdamW(AdamW8bit(m={"w": m}, v={"w": v}, block_size=256), Pager(1 << 20), 256)
    paged = PagedAdamW(MAKERS[1](), Pager(1 << 20), 256)
    with pytest.raises(KeyError, match="arrays and gradients differ"):
        paged.update(arrays, gradients | {"more": torch.ones(1)}, 0.1)
    with pytest.raises(ValueError, match=r"the gradient of small is nan at index \(0, 0\)"):
        paged.update(arrays, gradients | {"small": torch.full((3, 5), torch.nan)}, 0.1)
    with pytest.raises(ValueError, match="AdamW writes into w and its moments: needed contiguous tensors"):
        paged.update(arrays | {"w": torch.ones(65, 30).T}, gradients, 0.1)
    assert (paged.step, paged.m) == (0, {})
    same(arrays, before)
