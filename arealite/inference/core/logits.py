"""What is done with logits beside drawing from them: penalties and biases before, logprobs that clients ask for after.

Called by batcher.py. Returned logprobs include penalties and biases, as SGLang's do (sampling/penaltylib, 0.5.23): they
are of the policy that drew the token, which a trainer's importance weights need. What the trainer computes has none.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from arealite.inference.core.sampler import Sampled
from arealite.inference.core.sequence import Scored, Sequence
from arealite.inference.core.served_model import HEAD_CHUNK, ServedModel

LARGEST = 1e30  # a logit that is to be finite in float32, whatever it is divided by


def adjust(sequences: list[Sequence], logits: torch.Tensor) -> torch.Tensor:
    """Rows of logits [B, V] as their requests want them: the same tensor where none wants anything, else float32.

    In this order: frequency and presence penalties are subtracted, for tokens generated so far; the repetition penalty
    divides what is positive and multiplies what is not, for tokens of prompt and answer; biases are added; before
    min_new_tokens what would end the answer gets -inf. Tokens generated before an interruption count as generated if
    the request says how many they are (`num_prompt_tokens` of the wire); otherwise nothing tells them from the prompt.
    """
    rows = [i for i, sequence in enumerate(sequences) if sequence.adjusts_logits]
    if rows:
        logits = logits.float()
    for i in rows:
        _adjust_row(sequences[i], logits[i])
    return logits


def _adjust_row(sequence: Sequence, row: torch.Tensor) -> None:
    params, request = sequence.request.params, sequence.request
    generated = sequence.tokens[sequence.num_prompt - request.num_given :]
    if (params.frequency_penalty or params.presence_penalty) and generated:
        ids, counts = np.unique(generated, return_counts=True)
        fall = params.frequency_penalty * counts + params.presence_penalty
        row[torch.from_numpy(ids)] -= torch.from_numpy(fall).to(row)
    if params.repetition_penalty != 1:
        seen = torch.from_numpy(np.unique(sequence.tokens))
        values, penalty = row[seen], params.repetition_penalty
        row[seen] = torch.where(values > 0, values / penalty, values * penalty).clamp_(-LARGEST, LARGEST)
    if params.logit_bias:
        biased, biases = zip(*params.logit_bias, strict=True)
        row[list(biased)] += row.new_tensor(biases).clamp_(-LARGEST, LARGEST)
    if len(generated) < params.min_new_tokens:
        row[[token for token in sequence.stop_ids if token < len(row)]] = -torch.inf


def force(sequences: list[Sequence], logits: torch.Tensor, drawn: Sampled) -> Sampled:
    """`drawn` from `logits` [B, V], with the tokens that requests bring (`forced_ids`) in place of their next ones, as
    long as there are such, and with the logprobs of these: over the full vocabulary, after temperature (1 where
    greedy)."""
    tokens, logprobs = [*drawn.tokens], [*drawn.logprobs]
    for i, sequence in enumerate(sequences):
        params = sequence.request.params
        if sequence.num_output < len(params.forced_ids):
            tokens[i] = params.forced_ids[sequence.num_output]
            logprobs[i] = float(_log_softmax(logits[i].float() / (params.temperature or 1.0))[tokens[i]])
    return replace(drawn, tokens=tokens, logprobs=logprobs)


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
