"""Who runs, who waits, what is computed next, and who gives back its pages when the KV cache is full.

Used by batcher.py, on the engine thread.
"""

from __future__ import annotations

import time
from array import array
from collections import deque

from arealite.inference.core.cache import PAGE_BYTES, PAGE_TOKENS, TOKEN_BYTES, PagePool, PrefixCache, pages_for
from arealite.inference.core.layout import span_order
from arealite.inference.core.sequence import Sequence, Span

REPLAY_TOKENS = 64  # where results are exact, prompts are computed in pieces that begin at multiples of this
JOINING_LIMIT_S = 0.25
MAX_OVERTAKING = 7  # that go before one who waits, since they find most of their tokens computed
MAX_PASSED_OVER = 64  # sequences at the head of the queue that wait for a prompt in progress, while others go first


class Scheduler:
    """First come, first served, but for `queue`. `running` is in the order of admission; under memory pressure the last
    one admitted is retracted: it loses its keys and values, keeps its tokens, and waits at the head of the queue.

    The oldest running sequence is never retracted for another, and every request fits the pool alone, so the queue
    always moves.
    """

    def __init__(
        self, pool: PagePool, max_running: int, step_tokens: int, replay: bool, joining_share: int | None = None
    ) -> None:
        """`step_tokens`: computed in one step at most, as far as prompts are concerned; running requests take theirs
        first. `replay`: every token is computed in a pass of one shape, whatever is cached, and after a retraction as
        it was the first time, so that neither changes a bit of the result. `joining_share`: sequences join when one in
        so many places is free, or JOINING_LIMIT_S after the last ones did; None: when any place is."""
        self.pool = pool
        self.prefix = PrefixCache(pool)
        self.max_running = max_running
        self.step_tokens = step_tokens
        self.replay = replay
        self._joining_share = joining_share
        self._admitted_at = 0.0  # time.monotonic()
        self._lacks_pages = False  # for the first one that waits, until somebody gives some back
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.num_retractions = 0

    @property
    def num_used_tokens(self) -> int:
        """Tokens of the pool that running sequences hold; what is only cached can be had at any time."""
        return (self.pool.num_pages - self.pool.num_free - self.pool.num_idle) * PAGE_TOKENS

    def queue(self, sequence: Sequence) -> None:
        """At the end of those who wait. One that finds most of its tokens computed, such as the next turn of a
        conversation, goes before the first that does not, who lets MAX_OVERTAKING of such by: what is cached is used
        while it is there. Of more conversations than the cache holds, each in its turn would find its pages gone."""
        _, num = self.prefix.match(sequence.request.lora, sequence.key)
        sequence.is_cached = 2 * num >= len(sequence.tokens)
        at = len(self.waiting)
        for i, other in enumerate(self.waiting if sequence.is_cached else ()):
            if not (other.is_cached or other.num_retractions or other.num_overtaking == MAX_OVERTAKING):
                other.num_overtaking += 1
                at = i
                break
        self.waiting.insert(at, sequence)

    @property
    def may_admit(self) -> bool:
        """Whether `admit` may find somebody."""
        num_places = self.max_running - len(self.running)
        if not self.waiting or self._lacks_pages or num_places <= 0:
            return False
        are_enough = self._joining_share is None or num_places >= self.max_running // self._joining_share
        return are_enough or time.monotonic() - self._admitted_at >= JOINING_LIMIT_S

    def admit(self) -> list[Sequence]:
        """Move waiting sequences to running, with pages for their tokens, as long as this step has room to begin them;
        returns these. One whose tokens are being computed for another waits for that, and finds them."""
        if not self.may_admit:
            return []
        busy = [s for s in self.running if s.num_missing > 1]
        room = self._prompt_room() - sum(s.num_missing for s in busy)
        in_progress = {self._next_part(s, s.num_computed) for s in busy if s.epoch == self.prefix.epoch}
        admitted: list[Sequence] = []
        passed_over: list[Sequence] = []
        while self.waiting and room > 0 and len(self.running) < self.max_running:
            sequence = self.waiting.popleft()
            pages, num = self.prefix.match(sequence.request.lora, sequence.key)
            usable, wanted = (self._usable(sequence, n) for n in (num, len(sequence.tokens)))
            if usable < wanted and self._next_part(sequence, num) in in_progress:
                passed_over.append(sequence)
                if len(passed_over) < MAX_PASSED_OVER:
                    continue
                break
            if not self._place(sequence, pages, usable):
                passed_over.append(sequence)
                self._lacks_pages = bool(self.running)
                break
            admitted.append(sequence)
            self.running.append(sequence)
            room -= sequence.num_missing
            if sequence.num_missing > 1:
                in_progress.add(self._next_part(sequence, num))
        self.waiting.extendleft(reversed(passed_over))
        if admitted:
            self._admitted_at = time.monotonic()
        return admitted

    def _prompt_room(self) -> int:
        """Tokens of prompts that one step computes; at least a page, whoever runs."""
        return max(PAGE_TOKENS, self.step_tokens - sum(s.num_missing == 1 for s in self.running))

    def _next_part(self, sequence: Sequence, num: int) -> tuple[str | None, bytes]:
        """The tokens up to the end of the page after the first `num`: equal for those who will compute the same."""
        return sequence.request.lora, sequence.key[: (num // PAGE_TOKENS + 1) * PAGE_BYTES]

    def _usable(self, sequence: Sequence, num: int) -> int:
        """So many of `num` known leading tokens need not be computed: not the last, nor what is to be scored."""
        if not self.replay:
            scored = sequence.num_scored
            return min(num, len(sequence.tokens) - 1 if scored == sequence.num_prompt - 1 else scored)
        return min(num, sequence.num_prompt - 1, sequence.num_scored) // REPLAY_TOKENS * REPLAY_TOKENS

    def _place(self, sequence: Sequence, known: list[int], num: int) -> bool:
        """Pages for all tokens, the first `num` of which are in `known`: whole pages are shared, one that is used in
        part is copied. Beside them one page must be free for each that runs."""
        pool = self.pool
        shared, partial = known[: num // PAGE_TOKENS], known[num // PAGE_TOKENS : pages_for(num)]
        num_own = pages_for(len(sequence.tokens)) - len(shared)
        pool.hold(known)  # so that making room cannot evict them
        fits = self.prefix.make_room(num_own + len(self.running))
        if not fits:  # what is shared costs nothing; the page that would be copied may be the one that is missing
            pool.drop(known[len(shared) :])
            known, partial, num = shared, [], len(shared) * PAGE_TOKENS
            fits = self.prefix.make_room(num_own + len(self.running))
        if fits:
            new_pages = pool.take(num_own)
            for source in partial:
                pool.copy_page(source, new_pages[0])
            pool.hold(shared)
            sequence.pages = array("i", shared + new_pages)
            sequence.num_computed, sequence.epoch = num, self.prefix.epoch
            if not sequence.num_retractions:
                sequence.num_cached = num
        pool.drop(known)
        return fits

    def plan(self) -> list[list[Span]]:
        """What to compute now, pass by pass: the next token of every sequence that lacks but one, then, in the order of
        admission, pieces of the others as far as there is room. One pass does it all, unless results must be exact."""
        self._grow()
        singles: list[Span] = []
        others: list[Sequence] = []
        pieces: list[Span] = []
        for sequence in self.running:
            start = sequence.num_computed
            if len(sequence.tokens) - start == 1 if not self.replay else start >= sequence.num_prompt:
                singles.append(Span(sequence, start, 1))
            else:
                others.append(sequence)
        room = self._prompt_room() if others else 0
        for sequence in others:
            if room > 0:
                end_of_piece = sequence.num_prompt if self.replay else len(sequence.tokens)
                longest = REPLAY_TOKENS if self.replay else room
                start = sequence.num_computed
                pieces.append(Span(sequence, start, min(end_of_piece - start, longest)))
                room -= pieces[-1].count
        if not self.replay:
            return [sorted(singles + pieces, key=span_order)] if singles or pieces else []
        return [*([piece] for piece in pieces), *([sorted(singles, key=span_order)] if singles else [])]

    def grow_ahead(self, sequences: list[Sequence]) -> bool:
        """A place for one more token of each; False where somebody would have to be retracted for it."""
        lacking = [s for s in sequences if s.num_computed == len(s.pages) * PAGE_TOKENS]
        if lacking and not self.prefix.make_room(len(lacking)):
            return False
        for sequence in lacking:
            sequence.pages.extend(self.pool.take(1))
        return True

    def _grow(self) -> None:
        """Give every running sequence a place for its next token, retracting the last admitted ones where needed."""
        for sequence in list(self.running):
            if sequence.num_computed < len(sequence.pages) * PAGE_TOKENS:
                continue
            while sequence.pages and not self.prefix.make_room(1):
                self.retract(self.running[-1])
            if sequence.pages:
                sequence.pages.extend(self.pool.take(1))

    def share(self, sequence: Sequence) -> None:
        """Let others find what is computed of a sequence. Called when that is known to be sound."""
        self._lacks_pages = False  # what others have, too, is given back
        num = sequence.num_computed
        if self.replay:  # only what anyone would compute in the same passes
            num = min(num, sequence.num_prompt) // REPLAY_TOKENS * REPLAY_TOKENS
        if num and sequence.epoch == self.prefix.epoch:
            # A prompt in progress has an end of its own; a page that it goes on filling is of no use to others.
            self.prefix.insert(
                sequence.request.lora, sequence.key[: num * TOKEN_BYTES], sequence.pages, num >= sequence.num_prompt
            )

    def retract(self, sequence: Sequence) -> None:
        """Back to the head of the queue; what is evicted of its keys and values will be computed again."""
        self.running.remove(sequence)
        self._release(sequence)
        sequence.forget_scores()
        sequence.num_retractions += 1
        self.num_retractions += 1
        self.waiting.appendleft(sequence)

    def retract_all(self) -> None:
        """Retract every running sequence; they keep their order."""
        while self.running:
            self.retract(self.running[-1])

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out for good, whether it runs or waits."""
        (self.running if sequence.pages else self.waiting).remove(sequence)
        self._release(sequence)

    def discard(self, sequence: Sequence) -> None:
        """Take out a sequence whose keys and values are not finite, and whatever may have been shared with it."""
        self.prefix.clear()  # it may hold the page that this sequence went on writing to
        self.pool.clean(sequence.pages)
        self.remove(sequence)

    def _release(self, sequence: Sequence) -> None:
        self.share(sequence)
        self.pool.drop(sequence.pages)
        del sequence.pages[:]
        sequence.num_computed = 0
