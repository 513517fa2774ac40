"""Simple, scalable FIFO: three queues."""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cache.lanes import Ints, Touch
from cache.policy import EvictionPolicy, register

_AWAY, _SMALL, _MAIN, _GHOST, _RETURNING = range(5)
_MOST_USES = 3  # a counter of two bits
_LATER = np.iinfo(np.int64).max
_MOVED, _FIRST = 2.0**-16, 2.0**-32  # steps between whole numbers, and between those again


@register
class S3FIFO(EvictionPolicy):
    """A small queue sifts newcomers; who was used there moves on to the main queue, where uses earn another round.

    While the main queue is not over its length, the small one evicts: the oldest that was used less than `threshold`
    times; those before it move to the main queue's end. The main queue puts its oldest back at its end, for each of up
    to three uses once, and evicts the first that has none left. What the small queue evicted last is remembered and
    goes straight to the main queue when it comes back. An event uses its members before anything goes.
    Source: Yang et al., FIFO Queues are All You Need for Cache Eviction, SOSP 2023.
    """

    name = "s3fifo"

    @dataclass(frozen=True)
    class Params:
        """The queues' lengths, as shares of the cache's slots rounded down, and who moves on."""

        small: float = 0.1
        """Of the small queue, which has at least one place."""
        ghost: float = 0.9
        """Of the memory of evicted experts."""
        threshold: int = 2
        """Uses in the small queue that let an expert move on; the one that admitted it does not count."""
        fill: bool = True
        """Until the first eviction, let newcomers beside a full small queue go to main, as libCacheSim does."""

        def __post_init__(self) -> None:
            if not (0 <= self.small <= 1 and self.ghost >= 0 and 1 <= self.threshold <= _MOST_USES):
                raise ValueError(f"small is from 0 to 1, ghost at least 0, threshold from 1 to {_MOST_USES}")

    def reset(self) -> None:
        super().reset()
        self.queue = self.zeros(np.int8)
        """The queue that an expert is in. RETURNING: it was found in the ghost queue and not admitted yet."""
        self.place = self.zeros(np.int64)
        """Ascends from the oldest; in the main queue 0, 1, 2 and so on."""
        self.freq = self.zeros(np.int64)
        """Uses that still count."""
        self._next_place = 0
        self._evicted = np.zeros(self.lanes.count, np.bool_)
        self._share_out()

    def resize(self, slots: Ints) -> None:
        super().resize(slots)
        self._share_out()
        while (lanes := self._forgetful(np.arange(self.lanes.count))).size:
            self._forget(lanes)

    def _share_out(self) -> None:
        """Divide every lane's slots among its queues."""
        slots = self.lanes.slots
        self._small = np.maximum((slots * self.params.small).astype(np.int64), 1)
        self._ghosts = (slots * self.params.ghost).astype(np.int64)

    def touch(self, touch: Touch) -> None:
        super().touch(touch)
        queue, freq, at = self.queue.reshape(-1), self.freq.reshape(-1), touch.at
        freq[at] = np.minimum(freq[at] + 1, _MOST_USES)
        queue[at[queue[at] == _GHOST]] = _RETURNING

    def on_insert(self, at: Ints) -> None:
        lanes = at // self.lanes.width
        queues = self.queue[lanes]
        to_main = self.queue.reshape(-1)[at] == _RETURNING
        if self.params.fill:
            full = (queues == _SMALL).sum(axis=1) >= self._small[lanes]
            to_main |= full & ~self._evicted[lanes]
        self._append(at, to_main, (queues == _MAIN).sum(axis=1))

    def _append(self, at: Ints, to_main: NDArray[np.bool_] | bool, end: Ints) -> None:
        """Put experts at the end of the main queue or of the small one."""
        self.queue.reshape(-1)[at] = np.where(to_main, _MAIN, _SMALL)
        self.place.reshape(-1)[at] = np.where(to_main, end, self._next_place)
        self.freq.reshape(-1)[at] = 0
        self._next_place += 1

    def on_evict(self, at: Ints) -> None:
        lanes, columns = np.divmod(at, self.lanes.width)
        self._evicted[lanes] = True
        self._move_on(lanes, columns)
        queue = self.queue.reshape(-1)
        small, main = queue[at] == _SMALL, queue[at] == _MAIN
        self._go_round(lanes[main], columns[main])
        queue[at] = _AWAY
        self._remember(lanes[small], columns[small])

    def _move_on(self, lanes: Ints, columns: Ints) -> None:
        """What the small queue lets go to main before it, or main, evicts these."""
        queue, place = self.queue[lanes], self.place[lanes]
        every = np.arange(len(lanes))
        victim = place[every, columns]
        hot = (queue == _SMALL) & (self.freq[lanes] >= self.params.threshold)
        from_small = queue[every, columns] == _SMALL
        length = (queue == _MAIN).sum(axis=1)
        # Where the small queue had its turn and yet main evicts, the small one let everything go.
        all_go = np.where(from_small, hot[every, columns], length <= self.lanes.slots[lanes] - self._small[lanes])
        hot &= (from_small[:, None] & (place < victim[:, None])) | all_go[:, None]
        while (rows := hot.any(axis=1).nonzero()[0]).size:
            oldest = np.where(hot[rows], place[rows], _LATER).argmin(axis=1)
            hot[rows, oldest] = False
            self._append(lanes[rows] * self.lanes.width + oldest, True, length[rows])
            length[rows] += 1

    def _go_round(self, lanes: Ints, columns: Ints) -> None:
        """Main's oldest, up to these that it evicts, have used up their uses and come again at the end."""
        if not len(lanes):
            return
        in_main, place, freq = self.queue[lanes] == _MAIN, self.place[lanes], self.freq[lanes]
        rounds, start = (array[np.arange(len(lanes)), columns][:, None] for array in (freq, place))
        length = in_main.sum(axis=1)[:, None]
        passed = rounds + (place < start)
        self.freq[lanes] = np.where(in_main, np.maximum(freq - passed, 0), freq)
        self.place[lanes] = np.where(in_main, (place - start - 1) % length, place)

    def _remember(self, lanes: Ints, columns: Ints) -> None:
        """Put these into the ghost queue, which forgets its oldest."""
        keeps = self._ghosts[lanes] > 0
        lanes, columns = lanes[keeps], columns[keeps]
        self.queue[lanes, columns] = _GHOST
        self.place[lanes, columns] = self._next_place
        self._next_place += 1
        lanes = self._forgetful(lanes)
        if len(lanes):
            self._forget(lanes)

    def _forgetful(self, lanes: Ints) -> Ints:
        """Those whose ghost queue is too long."""
        full: Ints = lanes[(self.queue[lanes] == _GHOST).sum(axis=1) > self._ghosts[lanes]]
        return full

    def _forget(self, lanes: Ints) -> None:
        """Take the oldest out of these ghost queues."""
        oldest = np.where(self.queue[lanes] == _GHOST, self.place[lanes], _LATER).argmin(axis=1)
        self.queue[lanes, oldest] = _AWAY

    def priorities(self, lanes: slice) -> NDArray[np.float64]:
        """Main's order is by uses, then by place. The small queue's turns are played through and put in between."""
        queue, place, freq = self.queue[lanes], self.place[lanes], self.freq[lanes]
        in_main = queue == _MAIN
        width = self.lanes.width
        values = np.where(in_main, freq * width + place, np.inf)
        rows, columns = (queue == _SMALL).nonzero()
        if not len(rows):
            return values
        order = np.lexsort((place[rows, columns], rows))  # lane after lane, the oldest first
        rows, columns = rows[order], columns[order]
        first = np.searchsorted(rows, rows)
        turn = np.arange(len(rows)) - first + 1
        hot = freq[rows, columns] >= self.params.threshold
        before = hot.cumsum() - hot
        moved = before - before[first]  # to main by then, from the same queue
        # Main gives up what is too much whenever the small queue has just evicted, or not yet begun.
        turns = np.concatenate([[True], ~hot[:-1]]) | (turn == 1)
        reached = in_main.sum(axis=1)[rows] + moved
        surplus = np.where(turns, np.maximum(reached - (self.lanes.slots[lanes] - self._small[lanes])[rows], 0), 0)
        lane = rows * 2 * width  # more than any surplus: the maximum so far, of each lane
        gone = np.maximum.accumulate(surplus + lane) - lane  # that main evicts by then
        values[rows, columns] = np.where(hot, reached, turn * _FIRST - 1)
        for row in np.unique(rows[gone > 0]).tolist():
            here = rows == row
            self._interleave(values[row], in_main[row], columns[here], hot[here], gone[here])
        return values

    def _interleave(
        self,
        values: NDArray[np.float64],
        in_main: NDArray[np.bool_],
        columns: Ints,
        hot: NDArray[np.bool_],
        gone: Ints,
    ) -> None:
        """Put the small queue's `columns`, the oldest first, between what main evicts before and after each."""
        order = np.sort(values[in_main]).tolist()
        for turn, (column, moves, number) in enumerate(
            zip(columns.tolist(), hot.tolist(), gone.tolist(), strict=True), start=1
        ):
            if number:
                # What moves on comes to lie at main's end: where the hand is, to be met in the next round.
                step = self.lanes.width + turn * _MOVED if moves else turn * _FIRST
                values[column] = order[number - 1] + step
            if moves:
                insort(order, values[column])
