"""Logprobs beside those of drawn tokens: of the prompt, of the likeliest tokens, of tokens that the client names.

Called by batcher.py, for the requests that ask for them.
"""

from __future__ import annotations

import torch

from arealite.inference.core.sequence import Scored, Sequence
from arealite.inference.core.served_model import HEAD_CHUNK, ServedModel


def note_choices(sequences: list[Sequence], logits: torch.Tensor) -> None:
    """Append to each sequence that wants them the logprobs of the likeliest and of the named tokens, for the token that
    is drawn from its row of `logits` [B, V]: over the full vocabulary, after temperature (1 where greedy)."""
    for i, sequence in enumerate(sequences):
        request = sequence.request
        if request.top_logprobs_num or request.token_ids_logprob:
            logprobs = _log_softmax(logits[i : i + 1].float() / (request.params.temperature or 1.0))
            top, named = _chosen(sequence, logprobs)
            sequence.top_logprobs += top
            sequence.token_ids_logprobs += named


def score_prompt(model: ServedModel, sequence: Sequence, start: int, hidden: torch.Tensor) -> None:
    """Append the logprobs, at temperature 1, of the prompt's tokens that follow positions `start` and later, whose
    hidden states [T, H] are given; the first token of all has none."""
    request = sequence.request
    if not sequence.input_logprobs:
        sequence.input_logprobs.append(None)
        sequence.input_top_logprobs.append(None)
        sequence.input_token_ids_logprobs.append(None)
    first = sequence.num_scored
    targets = request.prompt_ids[first + 1 : start + len(hidden) + 1]
    for done in range(0, len(targets), HEAD_CHUNK):
        wanted = torch.tensor(targets[done : done + HEAD_CHUNK], device=hidden.device)
        at = first - start + done
        logprobs = _log_softmax(model.logits(hidden[at : at + len(wanted)]))
        sequence.input_logprobs += logprobs.gather(1, wanted[:, None])[:, 0].tolist()
        top, named = _chosen(sequence, logprobs)
        sequence.input_top_logprobs += top
        sequence.input_token_ids_logprobs += named


def _log_softmax(logits: torch.Tensor) -> torch.Tensor:
    """In float32; what has no probability gets its lowest number, since JSON has no infinity. torch's log_softmax sums
    a large vocabulary less exactly than logsumexp does, which would show as a mismatch with the trainer."""
    rows = logits.float()
    return (rows - rows.logsumexp(-1, keepdim=True)).clamp_(min=torch.finfo(torch.float32).min)


def _chosen(sequence: Sequence, logprobs: torch.Tensor) -> tuple[list[Scored | None], list[Scored | None]]:
    """Of rows [N, V]: the likeliest tokens of each, best first, and the named ones in the client's order."""
    top, ids = logprobs.topk(sequence.request.top_logprobs_num)
    likeliest = [list(zip(*row, strict=True)) for row in zip(top.tolist(), ids.tolist(), strict=True)]
    named = list(sequence.request.token_ids_logprob)
    values = logprobs[:, named].tolist()
    return [*likeliest], [list(zip(row, named, strict=True)) for row in values]
