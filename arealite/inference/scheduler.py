"""Who runs, who waits, and who gives back its pages when the KV cache is full. Used by the engine thread only."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import torch

from arealite.inference.cache import PAGE_TOKENS, CachedPrompt, PagePool, PromptIndex, pages_for
from arealite.inference.sequence import Sequence


@dataclass
class Admitted:
    """What joins in this step: `computed` needs a forward pass over so many of its first tokens, `shared` found its
    prompt in the index and starts from the cached logits [V] after it."""

    computed: list[tuple[Sequence, int]] = field(default_factory=list)
    shared: list[tuple[Sequence, torch.Tensor]] = field(default_factory=list)


class Scheduler:
    """First come, first served. `running` is in the order of admission; under memory pressure the last one admitted is
    retracted: it loses its keys and values, keeps its tokens, and waits at the head of the queue.

    The oldest running sequence is never retracted for another, and every request fits the pool alone, so the queue
    always moves.
    """

    def __init__(self, pool: PagePool, max_running: int, replay: bool) -> None:
        """`replay`: a retracted sequence computes its prompt in one pass and its own tokens one by one, as it did the
        first time, so that retraction does not change a bit of the result."""
        self.pool = pool
        self.index = PromptIndex(pool)
        self.max_running = max_running
        self.replay = replay
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.num_retractions = 0

    @property
    def num_used_tokens(self) -> int:
        """Tokens of the pool that are held, cached prompts included."""
        return (self.pool.num_pages - self.pool.num_free) * PAGE_TOKENS

    def admit(self, max_tokens: int) -> Admitted:
        """Move waiting sequences to running, with pages, for a forward pass of at most `max_tokens` tokens (one longer
        prompt may go alone). A sequence whose prompt is computed in this very step waits for it and finds it next time.
        """
        admitted = Admitted()
        in_progress: set[bytes] = set()
        skipped: list[Sequence] = []
        spent = 0
        while self.waiting and len(self.running) < self.max_running:
            sequence = self.waiting.popleft()
            num = sequence.num_prompt if self.replay else len(sequence.tokens)
            sharable = num == sequence.num_prompt and not sequence.num_scored < sequence.num_prompt - 1
            if sharable and sequence.prompt_key in in_progress:
                skipped.append(sequence)
                continue
            entry = self.index.find(sequence.prompt_key) if sharable else None
            if entry is not None and self._share(sequence, entry):
                admitted.shared.append((sequence, entry.logits))
            elif (spent and spent + num > max_tokens) or not self._place(sequence, num):
                skipped.append(sequence)
                break
            else:
                spent += num
                admitted.computed.append((sequence, num))
                if sharable:
                    in_progress.add(sequence.prompt_key)
            self.running.append(sequence)
        self.waiting.extendleft(reversed(skipped))
        return admitted

    def _room_for(self, num_pages: int) -> bool:
        """Free pages for the newcomer and one more for each running sequence, evicting cached prompts."""
        wanted = num_pages + len(self.running)
        while self.pool.num_free < wanted and self.index.evict_oldest():
            pass
        return self.pool.num_free >= wanted

    def _place(self, sequence: Sequence, num: int) -> bool:
        if not self._room_for(pages_for(num)):
            return False
        sequence.pages = self.pool.take(pages_for(num))
        sequence.num_computed = num
        return True

    def _share(self, sequence: Sequence, entry: CachedPrompt) -> bool:
        """Take the prompt's keys and values from the index: whole pages are shared, a partly filled one is copied."""
        self.pool.hold(entry.pages)  # so that making room cannot free them
        num_whole = sequence.num_prompt // PAGE_TOKENS
        partial = entry.pages[num_whole:]
        if not self._room_for(len(partial)):
            self.pool.drop(entry.pages)
            return False
        own = self.pool.take(len(partial))
        for source, target in zip(partial, own, strict=True):
            self.pool.copy_page(source, target)
        self.pool.drop(partial)
        sequence.pages = entry.pages[:num_whole] + own
        sequence.num_computed = sequence.num_cached = sequence.num_prompt
        return True

    def grow(self) -> None:
        """Give every running sequence a place for its next token, retracting the last admitted ones where needed."""
        for sequence in list(self.running):
            if sequence.num_computed < len(sequence.pages) * PAGE_TOKENS:
                continue
            while sequence.pages and self.pool.num_free == 0:
                if not self.index.evict_oldest():
                    self.retract(self.running[-1])
            if sequence.pages:
                sequence.pages += self.pool.take(1)

    def retract(self, sequence: Sequence) -> None:
        """Back to the head of the queue; its keys and values will be computed again."""
        self.running.remove(sequence)
        self._release(sequence)
        sequence.num_retractions += 1
        self.num_retractions += 1
        self.waiting.appendleft(sequence)

    def retract_all(self) -> None:
        """Retract every running sequence; they keep their order."""
        while self.running:
            self.retract(self.running[-1])

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out for good, whether it runs or waits."""
        (self.running if sequence in self.running else self.waiting).remove(sequence)
        self._release(sequence)

    def _release(self, sequence: Sequence) -> None:
        self.pool.drop(sequence.pages)
        sequence.pages = []
        sequence.num_computed = 0
