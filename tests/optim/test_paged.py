"""Paged moments: the same bits under any interleaving, the budget kept, faults counted, nothing left behind."""

import copy
import gc
import inspect
import os
import signal
import subprocess
import sys
import warnings
from collections import OrderedDict
from contextlib import ExitStack

import numpy as np
import pytest
import wrong_paged
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, multiple, rule, run_state_machine_as_test

from minift.optim.adamw import AdamW
from minift.optim.adamw8bit import AdamW8bit, zero_moments
from minift.optim.paged import LARGEST_PAGE, PagedAdamW
from minift.optim.pager import Pager
from minift.quant.blockwise import BlockwiseTensor
from minift.studies.spikes import draw, lengths_with_spikes, resident_bytes
from nn import checks

SIZES = (8, 24, 40, 8, 100, 1, 64, 33)  # bytes of a page


# --- the pager: any sequence of uses, beside a list of bytes that never moves -----------------------------------------


class Beside:
    """A pager, and what it must agree with: every page's bytes, and a list in order of use."""

    def __init__(self, make, budget):
        self.pager, self.budget = make(budget), budget
        self.content: list[bytearray] = []
        self.resident: OrderedDict[int, int] = OrderedDict()
        self.in_use: list[int] = []
        self.faults = self.evictions = self.peak = 0

    def add(self, data):
        if len(data) > self.budget:
            refused(lambda: self.pager.add(np.frombuffer(data, np.uint8)), "does not fit a budget")
            return
        assert self.pager.add(np.frombuffer(data, np.uint8)) == len(self.content)
        self.content.append(bytearray(data))

    def use(self, numbers, value, inside=()):
        """Pages open inside each other, each changed while all are open; those of `inside` open and close in turn."""
        with ExitStack() as stack:
            opened = []
            for number in numbers:
                used = sum(len(self.content[n]) for n in {*self.in_use})
                if number not in self.resident and used + len(self.content[number]) > self.budget:
                    before = self.pager.faults, self.pager.resident_bytes
                    refused(lambda n=number: stack.enter_context(self.pager.page(n)), "does not fit a budget")
                    assert (self.pager.faults, self.pager.resident_bytes) == before, "a refused page was brought in"
                    continue
                self._bring_in(number)
                opened.append((number, stack.enter_context(self.pager.page(number))))
                self.in_use.append(number)
                self.check()
            for number, data in opened:
                assert data.tobytes() == bytes(self.content[number]), f"page {number} has other bytes"
                data[value % data.size] = value
                self.content[number][value % data.size] = value
            for number in inside:
                self.use([number], value + 1)
            for number, data in opened:
                assert data.tobytes() == bytes(self.content[number]), f"page {number} changed with another"
                self.in_use.remove(number)
        self.check()

    def _bring_in(self, number):
        if number not in self.resident:
            self.faults += 1
            self._evict(self.budget - len(self.content[number]))
            self.resident[number] = len(self.content[number])
            self.peak = max(self.peak, sum(self.resident.values()))
        self.resident.move_to_end(number)

    def _evict(self, allowed):
        for number in [n for n in self.resident if n not in self.in_use]:
            if sum(self.resident.values()) > allowed:
                del self.resident[number]
                self.evictions += 1

    def limit(self, budget):
        self.budget = budget
        self.pager.limit(budget)
        self._evict(budget)
        self.check()

    def check(self):
        pager = self.pager
        assert sum(d.nbytes for d in pager._resident.values()) == pager.resident_bytes, "miscounted resident bytes"
        assert pager.resident_bytes <= self.budget, (
            f"{pager.resident_bytes} bytes resident, the budget is {self.budget}"
        )
        assert sorted(pager._resident) == sorted(self.resident), "others are resident than the last used"
        found = pager.faults, pager.evictions, pager.peak_bytes
        assert found == (self.faults, self.evictions, self.peak), f"faults, evictions, peak: {found}"
        for number, content in enumerate(self.content):
            assert pager.peek(number).tobytes() == bytes(content), f"page {number} has other bytes"
        assert (pager.faults, sorted(pager._resident)) == (self.faults, sorted(self.resident)), "a look was a use"


def refused(action, text):
    try:
        action()
    except ValueError as error:
        assert text in str(error), str(error)
    else:
        raise AssertionError(f"not refused: {text}")


def machine(make):
    class Machine(RuleBasedStateMachine):
        pages = Bundle("pages")
        some = st.lists(pages, max_size=4)

        def __init__(self):
            super().__init__()
            self.beside = Beside(make, 100)

        @rule(target=pages, size=st.sampled_from((*SIZES, 101)), fill=st.integers(0, 255))
        def add(self, size, fill):
            before = len(self.beside.content)
            self.beside.add(bytes([fill]) * size)
            return multiple(*range(before, len(self.beside.content)))

        @rule(numbers=some, inside=some, value=st.integers(0, 254))
        def use(self, numbers, inside, value):
            self.beside.use(numbers, value, inside)

        @rule(budget=st.integers(0, 150))
        def limit(self, budget):
            self.beside.limit(budget)

        @invariant()
        def agree(self):
            self.beside.check()

    return Machine


def test_any_interleaving_is_a_bitwise_no_op():
    """Adds, uses inside uses, smaller and larger budgets, in any order, with a budget of hardly more than a page."""
    run_state_machine_as_test(machine(Pager), settings=settings(max_examples=60, stateful_step_count=25, deadline=None))


def one_at_a_time(make, seed):
    rng, beside = np.random.default_rng(seed), Beside(make, 100)
    for i, size in enumerate(SIZES):
        beside.add(bytes([i + 1]) * size)
    for _ in range(40):
        beside.use([int(rng.integers(len(SIZES)))], int(rng.integers(256)))


def inside_each_other(make, seed):
    rng, beside = np.random.default_rng(seed), Beside(make, 120)
    for i, size in enumerate(SIZES):
        beside.add(bytes([i + 1]) * size)
    for _ in range(20):
        first, *others = (int(n) for n in rng.integers(len(SIZES), size=6))
        beside.use([first, *others[:2]], int(rng.integers(255)))
        beside.use([first], int(rng.integers(255)), inside=others)


def budgets_that_change(make, seed):
    rng, beside = np.random.default_rng(seed), Beside(make, 300)
    for i, size in enumerate(SIZES):
        beside.add(bytes([i + 1]) * size)
    for budget in rng.integers(100, 301, size=12):
        beside.use([int(rng.integers(len(SIZES)))], int(rng.integers(256)))
        beside.limit(int(budget))


def a_page_larger_than_the_budget_is_refused(make, seed):
    beside = Beside(make, 50 + seed)
    beside.add(bytes(51 + seed))
    beside.add(bytes(50 + seed))
    beside.limit(49)
    beside.use([0], 7)


def paging_changes_no_bit(make, seed):
    """Every parameter and moment, for both optimizers, with room for two pages."""
    for optimizer in (AdamW(weight_decay=0.1), AdamW8bit(weight_decay=0.1, block_size=64)):
        in_step(optimizer, PagedAdamW(copy.deepcopy(optimizer), make(2 * 8 * 256), 256), seed)


PROPERTIES = (
    one_at_a_time,
    inside_each_other,
    budgets_that_change,
    a_page_larger_than_the_budget_is_refused,
    paging_changes_no_bit,
)


# --- the optimizer in pages -------------------------------------------------------------------------------------------


def parameters(seed=0):
    """Of less than a page, of several, of whole blocks and not; one in 32 bits beside those in 8; one that is empty."""
    rng = np.random.default_rng(seed)
    shapes = {"w": (70, 65), "small": (3, 5), "norm": (4100,), "none": (0, 4)}
    return {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}


def gradients_of(arrays, step, seed=0):
    rng = np.random.default_rng([seed, step])
    return {n: (rng.standard_normal(a.shape) * 10 ** rng.uniform(-4, 0)).astype(a.dtype) for n, a in arrays.items()}


def same_moments(one, other):
    assert one.keys() == other.keys()
    for n in one:
        if isinstance(one[n], BlockwiseTensor):
            assert (one[n].shape, one[n].block_size) == (other[n].shape, other[n].block_size)
            checks.same_bits(one[n].code, other[n].code, f"codebook of {n}")
            checks.same_bits(one[n].codes, other[n].codes, f"codes of {n}")
            checks.same_bits(one[n].absmax, other[n].absmax, f"absmax of {n}")
        else:
            checks.same_bits(one[n], other[n], n)


def in_step(plain, paged, seed=0, steps=3):
    here, there = parameters(seed), parameters(seed)
    for _ in range(steps):
        gradients = gradients_of(here, plain.step, seed)
        plain.update(here, gradients, 0.05)
        paged.update(there, gradients, 0.05)
        for n in here:
            checks.same_bits(there[n], here[n], n)
    same_moments(paged.m, plain.m)
    same_moments(paged.v, plain.v)
    assert (paged.step, paged.nbytes) == (plain.step, plain.nbytes)
    return paged


@pytest.mark.parametrize("holds", PROPERTIES)
@pytest.mark.parametrize("seed", range(3))
def test_pager(holds, seed):
    holds(Pager, seed)


def test_pager_kill_matrix():
    checks.kill_matrix(PROPERTIES, wrong_paged.PAGERS, range(2))


MAKERS = [lambda **state: AdamW(0.8, 0.95, 1e-3, 0.3, **state), lambda **s: AdamW8bit(0.8, 0.95, 1e-3, 0.3, **s)]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("dtype", checks.DTYPES)
def test_one_page_is_enough(make, dtype):
    """And then every page faults in every step: the worst there is for the least recently used."""
    arrays = {"w": np.ones((16, 256), dtype)}
    plain, exact = make(), copy.deepcopy(arrays)
    paged = PagedAdamW(make(), pager := Pager(8192 * np.dtype(dtype).itemsize), 1024)
    page = 1024 * 2 * np.dtype(dtype).itemsize if isinstance(plain, AdamW) else 1024 * 2 + 8 * 4
    pager.limit(page)
    for step in range(3):
        gradients = gradients_of(arrays, step)
        paged.update(arrays, gradients, 0.1)
        plain.update(exact, gradients, 0.1)
    checks.same_bits(arrays["w"], exact["w"], "θ")
    assert pager.counts == {
        "budget_bytes": page,
        "peak_resident_bytes": page,
        "page_faults": 3 * 4,
        "evictions": 3 * 4 - 1,
    }
    pager.limit(4 * page)
    paged.update(arrays, gradients, 0.1)
    paged.update(arrays, gradients, 0.1)
    assert pager.faults == 3 * 4 + 3  # one was there, and then all are
    assert repr(pager) == (
        f"Pager(4 pages, {4 * page:,} bytes, {4 * page:,} of at most {4 * page:,} resident, 15 faults, 11 evictions)"
    )


def test_everything_in_8_bits_even_what_is_empty():
    paged = PagedAdamW(AdamW8bit(min_8bit_size=0, block_size=7), Pager(1000), 70)
    in_step(AdamW8bit(min_8bit_size=0, block_size=7), paged)
    assert isinstance(paged.m["none"], BlockwiseTensor)


@pytest.mark.parametrize("make", MAKERS)
def test_a_state_that_exists_is_moved_into_pages(make):
    """A run that goes on: from the moments of either kind of optimizer, at any step."""
    whole, arrays = make(), parameters()
    for step in range(4):
        if step == 2:
            state = {"step": 2, "m": copy.deepcopy(whole.m), "v": copy.deepcopy(whole.v)}
            resumed, there = PagedAdamW(make(**state), Pager(20_000), 512), copy.deepcopy(arrays)
            same_moments(resumed.m, whole.m)
            same_moments(resumed.v, whole.v)
            assert (resumed.optimizer.m, resumed.optimizer.v) == ({}, {})
        gradients = gradients_of(arrays, step)
        whole.update(arrays, gradients, 0.05)
        if step >= 2:
            resumed.update(there, gradients, 0.05)
    for n in arrays:
        checks.same_bits(there[n], arrays[n], n)
    same_moments(resumed.m, whole.m)


def test_defaults():
    """Pages of 16,384 numbers: 32 KiB of codes and 64 pairs of scales. What is in them is not printed."""
    given = inspect.signature(PagedAdamW).parameters
    assert [(name, p.default is p.empty) for name, p in given.items()] == [
        ("optimizer", True),
        ("pager", True),
        ("page_elements", False),
    ]
    paged = PagedAdamW(AdamW8bit(), Pager(LARGEST_PAGE))
    paged.update({"w": np.ones(16_385)}, {"w": np.ones(16_385)}, 0.1)
    assert [paged.pager.peek(number).size for number in (0, 1)] == [LARGEST_PAGE, 2 + 8] == [32_768 + 512, 10]
    assert repr(paged) == f"PagedAdamW(optimizer={AdamW8bit(step=1)}, pager={paged.pager}, page_elements=16384)"


def test_pages_of_one_number():
    here, there = ({"w": np.ones((2, 3))} for _ in range(2))
    plain, paged = AdamW(), PagedAdamW(AdamW(), Pager(16), 1)
    for step in range(2):
        gradients = gradients_of(here, step)
        plain.update(here, gradients, 0.1)
        paged.update(there, gradients, 0.1)
    checks.same_bits(there["w"], here["w"], "θ")
    assert paged.pager.faults == 2 * 6


def test_what_does_not_fit_is_refused_before_anything_moves():
    arrays = parameters()
    before = {n: a.tobytes() for n, a in arrays.items()}
    gradients = gradients_of(arrays, 0)
    narrow, two = PagedAdamW(AdamW8bit(), Pager(2000), 1024), {"fits": np.zeros(9), "w": np.zeros(5000)}
    with pytest.raises(ValueError, match=r"a page of 2,080 bytes does not fit a budget of 2,000: raise the budget"):
        narrow.update(two, {n: np.ones_like(a) for n, a in two.items()}, 0.1)
    assert narrow.step == 0 and not two["fits"].any()
    shorter = PagedAdamW(AdamW(step=1, m={"w": np.zeros(3)}, v={"w": np.zeros(3)}), Pager(2000))
    with pytest.raises(ValueError, match=r"the moments of w have shape \(3,\), needed \(2, 3\), as the parameter"):
        shorter.update(two := {"w": np.zeros((2, 3))}, {"w": np.ones((2, 3))}, 0.1)
    assert shorter.step == 1 and not two["w"].any()
    m, v = zero_moments(np.zeros(300, np.float32), 64, 0)
    for moments in ({"m": {"w": v}, "v": {"w": v}}, {"m": {"w": m}, "v": {"w": m}}):
        with pytest.raises(ValueError, match="the moments of w: another map than `zero_moments` has"):
            PagedAdamW(AdamW8bit(block_size=64, **moments), Pager(1 << 20), 256)
    with pytest.raises(ValueError, match="the moments of w: blocks of 64, needed 256, as the optimizer has"):
        PagedAdamW(AdamW8bit(block_size=256, m={"w": m}, v={"w": v}), Pager(1 << 20), 256)
    with pytest.raises(ValueError, match="page_elements is 300, needed a multiple of 256"):
        PagedAdamW(AdamW8bit(), Pager(2000), 300)
    with pytest.raises(ValueError, match="page_elements is 0, needed a multiple of 1"):
        PagedAdamW(AdamW(), Pager(2000), 0)
    paged = PagedAdamW(AdamW8bit(), Pager(1 << 20))
    with pytest.raises(KeyError, match="arrays and gradients differ"):
        paged.update(arrays, gradients | {"more": np.ones(1)}, 0.1)
    with pytest.raises(ValueError, match=r"the gradient of small is nan at index \(0, 0\)"):
        paged.update(arrays, gradients | {"small": np.full((3, 5), np.nan)}, 0.1)
    with pytest.raises(ValueError, match="AdamW writes into w: needed a contiguous array"):
        paged.update(arrays | {"w": np.asfortranarray(arrays["w"])}, gradients, 0.1)
    assert ({n: a.tobytes() for n, a in arrays.items()}, paged.step, paged.m) == (before, 0, {})
    wide = {"w": np.ones(3, np.float32)}
    PagedAdamW(AdamW(), Pager(100)).update(wide, {"w": np.full(3, 1e19, np.float32) * 1.5}, 0.1)  # AdamW takes it too


def test_a_smaller_budget_than_what_is_in_use_is_refused():
    pager = Pager(100)
    with pager.page(pager.add(np.ones(60, np.uint8))) as data:
        with pytest.raises(ValueError, match="pages in use take 60 bytes, the budget cannot be 59"):
            pager.limit(59)
        other = pager.add(np.ones(70, np.uint8))
        text = "a page of 70 bytes beside 60 bytes of pages in use does not fit a budget of 100"
        with pytest.raises(ValueError, match=text), pager.page(other):
            pass
        assert pager.budget == 100
        pager.limit(60)
        data[:] = 2
    pager.limit(0)
    assert pager.resident_bytes == 0 and (pager.peek(0) == 2).all()


def test_a_page_is_given_back_when_its_user_fails():
    pager = Pager(100)
    with pytest.raises(KeyError), pager.page(pager.add(np.zeros(60, np.uint8))) as data:
        data[:] = 5
        raise KeyError
    pager.limit(0)
    assert (pager.peek(0) == 5).all()


# --- the file ---------------------------------------------------------------------------------------------------------

CHILD = """
import os, sys, time
import numpy as np
from minift.optim.pager import Pager
pager = Pager(1000, sys.argv[1])
for i in range(20):
    pager.add(np.full(500, i, np.uint8))
for i in range(20):
    with pager.page(i) as data:
        data += 1
links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
files = [os.readlink(link) for link in links if os.path.islink(link)]
print(any(sys.argv[1] in file for file in files), os.listdir(sys.argv[1]), flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="looks into /proc")
def test_a_killed_process_leaves_no_file(tmp_path):
    """It works in the folder that it was given, where its file has no name at any time."""
    with subprocess.Popen([sys.executable, "-c", CHILD, tmp_path], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "True []\n"
        process.send_signal(signal.SIGKILL)
    assert list(tmp_path.iterdir()) == []


def test_the_file_is_closed_with_the_pager():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Pager(10).add(np.ones(3, np.uint8))
        gc.collect()
    assert [str(w.message) for w in caught if w.category is ResourceWarning] == []


def test_the_room_on_disk_is_reserved(monkeypatch):
    """A full disk is an error when a page is added, not a bus error when it is written."""

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left on device"):
        Pager(100).add(np.ones(3, np.uint8))
    monkeypatch.delattr(os, "posix_fallocate")  # macOS
    pager = Pager(100)
    for value in (1, 2):
        pager.add(np.full(60, value, np.uint8))
    with pager.page(0) as one:
        one[:] = 9
    with pager.page(1):
        assert (pager.peek(0) == 9).all() and (pager.peek(1) == 2).all()


# --- a run with spikes ------------------------------------------------------------------------------------------------


def test_lengths_with_spikes():
    lengths = lengths_with_spikes()
    assert lengths == lengths_with_spikes() != lengths_with_spikes(seed=1)
    assert [i for i, n in enumerate(lengths, 1) if n == 1400] == [15, 30, 45, 60]
    rest = [n for n in lengths if n != 1400]
    assert 240 <= min(rest) < 250 and 350 < max(rest) <= 360


@pytest.mark.parametrize(("optimizer", "state"), [(AdamW(), 8.0), (AdamW8bit(), 2 + 8 / 256)])
def test_spikes_cost_faults_instead_of_memory(tmp_path, optimizer, state):
    """Without paging the longest sequence and the whole state do not fit together; with it the device is never
    exceeded, and pages fault in the step after a spike, and in no other but the first."""
    tokens = [300, 310, 1400, 290, 1400, 300]
    device = 3_000_000 if state == 8 else 2_900_000
    records = resident_bytes(tokens, optimizer, parameters=1 << 17, device_bytes=device, page_elements=1 << 12)
    assert [(r["step"], r["phase"]) for r in records] == [(s, p) for s in range(1, 7) for p in ("backward", "update")]
    whole = int((1 << 17) * state)
    for r in records:
        assert r["activation_bytes"] == (2048 * r["tokens"] if r["phase"] == "backward" else 0)
        assert r["activation_bytes"] + r["resident_bytes"] <= r["device_bytes"] == device
    assert max(r["activation_bytes"] for r in records) + whole > device
    assert records[-1]["state_bytes"] == records[-1]["resident_bytes"] == whole
    pages = 32
    left = (device - 1400 * 2048) // (whole // pages)  # pages beside a spike
    assert 0 < left < pages
    faults = [r["page_faults"] for r in records if r["phase"] == "update"]
    assert np.diff([0, *faults]).tolist() == [pages, 0, pages - left, 0, pages - left, 0]
    draw(records, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_activations_that_do_not_fit_alone_are_refused():
    with pytest.raises(ValueError, match="2,000 tokens of 2,048 bytes do not fit 3,000,000 bytes of device memory"):
        resident_bytes([300, 2000], AdamW())
