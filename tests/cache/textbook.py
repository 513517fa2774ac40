"""Queue algorithms as their papers state them: one cache, lists, one request at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod


class Textbook(ABC):
    """A cache of `slots` objects. Lists have their oldest, or least recently used, first."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.held: set[int] = set()

    def request(self, x: int) -> int | None:
        """Use `x`; what had to go for it."""
        if x in self.held:
            self.hit(x)
            return None
        victim = self.make_room(x) if len(self.held) == self.slots else None
        self.held.add(x)
        self.insert(x)
        return victim

    def make_room(self, x: int) -> int:
        return self.evict()

    def evict(self) -> int:
        victim = self.choose()
        self.held.remove(victim)
        return victim

    @abstractmethod
    def hit(self, x: int) -> None: ...

    @abstractmethod
    def insert(self, x: int) -> None: ...

    @abstractmethod
    def choose(self) -> int:
        """Take the next victim out of the lists."""


class FIFO(Textbook):
    def __init__(self, slots: int) -> None:
        super().__init__(slots)
        self.queue: list[int] = []

    def hit(self, x: int) -> None:
        pass

    def insert(self, x: int) -> None:
        self.queue.append(x)

    def choose(self) -> int:
        return self.queue.pop(0)


class LIFO(FIFO):
    def choose(self) -> int:
        return self.queue.pop()


class SLRU(Textbook):
    def __init__(self, slots: int, segments: int = 4, fill: bool = True) -> None:
        super().__init__(slots)
        self.lists: list[list[int]] = [[] for _ in range(segments)]
        self.most = [slots - slots // segments * (segments - 1)] + [slots // segments] * (segments - 1)
        self.fill = fill

    def hit(self, x: int) -> None:
        level = next(i for i, part in enumerate(self.lists) if x in part)
        self.lists[level].remove(x)
        level = min(level + 1, len(self.lists) - 1)
        self.lists[level].append(x)
        while level and len(self.lists[level]) > self.most[level]:
            self.lists[level - 1].append(self.lists[level].pop(0))
            level -= 1

    def insert(self, x: int) -> None:
        roomy = [i for i, part in enumerate(self.lists) if len(part) < self.most[i]]
        self.lists[roomy[0] if self.fill and roomy else 0].append(x)

    def choose(self) -> int:
        return next(part for part in self.lists if part).pop(0)


class ARC(Textbook):
    def __init__(self, slots: int) -> None:
        super().__init__(slots)
        self.t1: list[int] = []
        self.t2: list[int] = []
        self.b1: list[int] = []
        self.b2: list[int] = []
        self.p = 0.0
        self.from_b2 = False

    def request(self, x: int) -> int | None:
        b1, b2 = len(self.b1), len(self.b2)
        self.from_b2 = x in self.b2
        if x in self.b1:
            self.p = min(self.p + max(b2 / b1, 1), self.slots)
        elif x in self.b2:
            self.p = max(self.p - max(b1 / b2, 1), 0)
        return super().request(x)

    def hit(self, x: int) -> None:
        (self.t1 if x in self.t1 else self.t2).remove(x)
        self.t2.append(x)

    def make_room(self, x: int) -> int:
        if x not in self.b1 and x not in self.b2:
            if len(self.t1) == self.slots:  # then B1 is empty, and this is not remembered
                victim = self.t1.pop(0)
                self.held.remove(victim)
                return victim
            if len(self.t1) + len(self.b1) == self.slots:
                self.b1.pop(0)
            elif len(self.held) + len(self.b1) + len(self.b2) == 2 * self.slots:
                self.b2.pop(0)
        return self.evict()

    def choose(self) -> int:
        t1 = len(self.t1)
        if not self.t2 or (t1 and (t1 > self.p or (t1 == self.p and self.from_b2))):
            self.b1.append(self.t1.pop(0))
            return self.b1[-1]
        self.b2.append(self.t2.pop(0))
        return self.b2[-1]

    def insert(self, x: int) -> None:
        ghosts = next((ghosts for ghosts in (self.b1, self.b2) if x in ghosts), None)
        if ghosts is None:
            self.t1.append(x)
        else:
            ghosts.remove(x)
            self.t2.append(x)


class SIEVE(Textbook):
    def __init__(self, slots: int) -> None:
        super().__init__(slots)
        self.queue: list[int] = []
        self.visited: set[int] = set()
        self.hand = 0

    def hit(self, x: int) -> None:
        self.visited.add(x)

    def insert(self, x: int) -> None:
        self.queue.append(x)

    def choose(self) -> int:
        while self.queue[self.hand] in self.visited:
            self.visited.remove(self.queue[self.hand])
            self.hand = (self.hand + 1) % len(self.queue)
        victim = self.queue.pop(self.hand)
        if self.hand == len(self.queue):
            self.hand = 0
        return victim


class S3FIFO(Textbook):
    def __init__(
        self, slots: int, small: float = 0.1, ghost: float = 0.9, threshold: int = 2, fill: bool = True
    ) -> None:
        super().__init__(slots)
        self.small: list[int] = []
        self.main: list[int] = []
        self.ghost: list[int] = []
        self.freq: dict[int, int] = {}
        self.most_small = max(1, int(slots * small))
        self.most_ghost = int(slots * ghost)
        self.threshold = threshold
        self.filling = fill

    def hit(self, x: int) -> None:
        self.freq[x] = min(self.freq[x] + 1, 3)

    def insert(self, x: int) -> None:
        if x in self.ghost:
            self.ghost.remove(x)
            self.main.append(x)
        elif self.filling and len(self.small) >= self.most_small:
            self.main.append(x)
        else:
            self.small.append(x)
        self.freq[x] = 0

    def make_room(self, x: int) -> int:
        returns = x in self.ghost  # a place in the ghost queue is free before something else needs it
        if returns:
            self.ghost.remove(x)
        victim = self.evict()
        if returns:
            self.ghost.append(x)
        return victim

    def choose(self) -> int:
        self.filling = False
        if len(self.main) <= self.slots - self.most_small:
            while self.small:
                x = self.small.pop(0)
                if self.freq[x] < self.threshold:
                    if self.most_ghost:
                        self.ghost = [*self.ghost, x][-self.most_ghost :]
                    return x
                self.main.append(x)
                self.freq[x] = 0
        while self.freq[self.main[0]]:
            self.freq[self.main[0]] -= 1
            self.main.append(self.main.pop(0))
        return self.main.pop(0)
