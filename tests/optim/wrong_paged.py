"""Pagers that lose, mix up or hoard pages: each must be rejected by a property."""

from contextlib import contextmanager

import numpy as np

from minift.optim.pager import Pager


class NeverWritesBack(Pager):
    """Takes every page for a clean one."""

    def _evict_down_to(self, allowed):
        while self.resident_bytes > allowed:
            number = next(number for number in self._resident if number not in self._in_use)
            self._resident.pop(number)
            self.resident_bytes -= self._places[number][1]
            self.evictions += 1


class WritesBackOnlyTheFirstTime(Pager):
    """Keeps the file as it was after the first eviction."""

    def _evict_down_to(self, allowed):
        written = self.__dict__.setdefault("written", set())
        kept = {n: np.array(self._in_file(n)) for n in written}
        before = set(self._resident)
        super()._evict_down_to(allowed)
        for number, content in kept.items():
            if number in before and number not in self._resident:
                self._in_file(number)[:] = content
        written |= before - set(self._resident)


class EvictsTheNewest(Pager):
    """Most recently used first."""

    def _evict_down_to(self, allowed):
        self._resident = type(self._resident)(reversed(self._resident.items()))
        super()._evict_down_to(allowed)
        self._resident = type(self._resident)(reversed(self._resident.items()))


class FirstInFirstOut(Pager):
    """A page that is used again does not become younger."""

    @contextmanager
    def page(self, number):
        order = list(self._resident)
        with super().page(number) as data:
            for other in [n for n in order if n in self._resident] if number in order else []:
                self._resident.move_to_end(other)
            yield data


class EvictsAfterwards(Pager):
    """Copies in first and makes room then: for an instant one page too many."""

    @contextmanager
    def page(self, number):
        budget, missing = self.budget, number not in self._resident
        if missing:
            self._require_room(self._places[number][1], self._bytes_in_use())
            self.budget = budget + self._places[number][1]
        with super().page(number) as data:
            self.budget = budget
            self._evict_down_to(budget)
            yield data


class NeverEvicts(Pager):
    def _evict_down_to(self, allowed):
        pass


class EvictsWhatIsInUse(Pager):
    def _evict_down_to(self, allowed):
        in_use, self._in_use = self._in_use, type(self._in_use)()
        super()._evict_down_to(allowed)
        self._in_use = in_use


class PagesOverlap(Pager):
    """One byte too near to the page before."""

    def add(self, content):
        number = super().add(content)
        start, size = self._places[number]
        if start:
            self._places[number] = start - 1, size
            self._in_file(number)[:] = content
        return number


class CountsHits(Pager):
    """Every access is a fault."""

    @contextmanager
    def page(self, number):
        self.faults += number in self._resident
        with super().page(number) as data:
            yield data


class ForgetsToCount(Pager):
    """Faults of pages that were resident once are not counted."""

    @contextmanager
    def page(self, number):
        seen, before = self.__dict__.setdefault("seen", set()), self.faults
        with super().page(number) as data:
            if number in seen:
                self.faults = before
            seen.add(number)
            yield data


class HandsOutCopies(Pager):
    """What is written into a page is lost."""

    @contextmanager
    def page(self, number):
        with super().page(number) as data:
            yield data.copy()


class AcceptsAnything(Pager):
    def _require_room(self, size, beside):
        pass

    def _evict_down_to(self, allowed):
        while self.resident_bytes > allowed and set(self._resident) - set(self._in_use):
            super()._evict_down_to(max(allowed, self._bytes_in_use()))
            if self.resident_bytes <= max(allowed, self._bytes_in_use()):
                return


class KeepsTheOldLimit(Pager):
    def limit(self, budget):
        self.budget = budget


class PeeksAsItUses(Pager):
    """Looking counts as use."""

    def peek(self, number):
        with self.page(number) as data:
            return data.copy()


PAGERS = (
    NeverWritesBack,
    WritesBackOnlyTheFirstTime,
    EvictsTheNewest,
    FirstInFirstOut,
    EvictsAfterwards,
    NeverEvicts,
    EvictsWhatIsInUse,
    PagesOverlap,
    CountsHits,
    ForgetsToCount,
    HandsOutCopies,
    AcceptsAnything,
    KeepsTheOldLimit,
    PeeksAsItUses,
)
