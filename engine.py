"""Sampler over the module that is being trained: paged cache, continuous batching, log-probs of what was drawn.

A prompt is prefilled once, packed with others, and its n samples share the pages. The last prompt token is not
prefilled: it is the input of the row's first decode step, so that every token drawn comes out of one function.

    prompt of 70 ids, n = 2        page 0 (64 ids) shared, page 1 (5 ids) copied, id 70 is fed to the first step

`decode_step` is that function: layers, head, temperature, draw, log-prob and bookkeeping on static buffers. It runs
eagerly on a CPU and as one CUDA graph per number of rows on a GPU; the host looks at the results every few steps.

A draw is keyed by (seed, index of the prompt in the call, k, position). On a CPU in fp32 a sample is bitwise the same
in any batch: the step runs on a multiple of ROW_TILE rows, because products of fewer rows go through other kernels
whose sums are ordered differently, and attention takes each row by itself. On a GPU the random numbers are the same
but the logits may differ in the last bit.
"""

import math
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

import kernels

PAGE = 64  # tokens a page, as in kernels.decode_attention
ROW_TILE = 16  # rows of a CPU step, tokens of a CPU prefill: multiples of this
LOOK = {"cpu": 4, "cuda": 16}  # decode steps between two looks of the host
PREFILL_TOKENS = 8192  # tokens of prompts that are prefilled together (one longer prompt goes alone)
SPAN = 128  # tokens of the vocabulary whose probabilities are summed before the cumulative sum
GPU_SHARE = 0.6  # of the free GPU memory, where the caller gives no cache_bytes
CPU_CACHE_BYTES = 2 << 30  # the same on a CPU; pages that are never used are never touched


class EngineError(ValueError):
    """A request that cannot be run, or weights that give no distribution; the message has the numbers."""


@dataclass(slots=True)
class Sample:
    """ids: what was generated, with the stop token. logprobs: of each id, nats, under the distribution drawn from
    (temperature 1 for greedy); None where they were not asked for. finish_reason: "stop" or "length"."""

    ids: list[int]
    logprobs: list[float] | None
    finish_reason: str


# ------------------------------------------------------------------------------------------------- drawing a token


def _signed(x: int) -> int:
    """The 64 low bits of x as a two's complement int64."""
    return (x + 2**63) % 2**64 - 2**63


def mix(x: torch.Tensor) -> torch.Tensor:
    """splitmix64 (Steele, Lea, Flood 2014) of int64 words: wraps alike on every device."""
    x = x + _signed(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ _shift(x, shift)) * _signed(factor)
    return x ^ _shift(x, 31)


def _shift(x: torch.Tensor, bits: int) -> torch.Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # >> of int64 keeps the sign; the mask clears it


def stream_keys(seed: int, prompts: int, n: int) -> list[list[int]]:
    """One int64 key for each (prompt, k) of a call: [prompts][n]."""
    key_P1 = mix(mix(torch.tensor(_signed(seed))) ^ torch.arange(prompts)[:, None])
    return mix(key_P1 ^ torch.arange(n)).tolist()


def uniform(key_B: torch.Tensor, position_B: torch.Tensor) -> torch.Tensor:
    """fp64 in [0, 1 - 2**-52], a function of (key, position) alone."""
    return _shift(mix(key_B ^ mix(position_B)), 12).double() * 2.0**-52


def inverse_cdf(p_BV: torch.Tensor, u_B: torch.Tensor):
    """(token_B, total_B): token i with probability p[i] / total; p is not normalised. Never a token of probability 0.

    Two levels, so that the whole vocabulary is read once and the fp64 cumulative sums are short.
    """
    spans_BNC = F.pad(p_BV, (0, -p_BV.shape[1] % SPAN)).unflatten(1, (-1, SPAN))
    cdf_BN = spans_BNC.sum(2).double().cumsum(1)
    target_B1 = u_B[:, None] * cdf_BN[:, -1:]
    span_B1 = torch.searchsorted(cdf_BN, target_B1, right=True)
    below_B1 = cdf_BN.gather(1, (span_B1 - 1).clamp(min=0)).masked_fill(span_B1 == 0, 0)
    share_B1 = (target_B1 - below_B1) / (cdf_BN.gather(1, span_B1) - below_B1)
    cdf_BC = spans_BNC.gather(1, span_B1[:, :, None].expand(-1, -1, SPAN)).squeeze(1).double().cumsum(1)
    inner_B1 = torch.searchsorted(cdf_BC, share_B1.clamp(max=1 - 2**-52) * cdf_BC[:, -1:], right=True)
    return (span_B1 * SPAN + inner_B1).squeeze(1), cdf_BN[:, -1]


def nucleus(z_BV: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Logits with -inf outside the top_k most likely tokens and outside the fewest that reach probability top_p."""
    sorted_BV, order_BV = z_BV.sort(1, descending=True, stable=True)
    p_BV = sorted_BV.softmax(1)
    dead_BV = (p_BV.cumsum(1) - p_BV >= top_p) | (torch.arange(z_BV.shape[1], device=z_BV.device) >= top_k)
    dead_BV[:, 0] = False
    return torch.empty_like(z_BV).scatter_(1, order_BV, sorted_BV.masked_fill_(dead_BV, -torch.inf))


def draw(logits_BV: torch.Tensor, u_B: torch.Tensor, knobs, mode: str):
    """(token_B, logp_B fp32) of fp32 logits, which are used up; mode: "sample", "greedy" or "filtered"."""
    z_BV = logits_BV if mode == "greedy" else logits_BV.div_(knobs.temperature)
    if mode == "filtered":
        z_BV = nucleus(z_BV, knobs.top_k, knobs.top_p)
    z_BV = z_BV.sub_(z_BV.amax(1, keepdim=True))
    token_B, total_B = inverse_cdf(z_BV.exp(), u_B)
    if mode == "greedy":
        token_B = z_BV.argmax(1)
    return token_B, z_BV.gather(1, token_B[:, None]).squeeze(1) - total_B.log().float()


def head_logits(x_BH: torch.Tensor, w_VH: torch.Tensor) -> torch.Tensor:
    """fp32 logits [B,V] that were never rounded to half precision, like those of kernels.linear_logp."""
    if x_BH.dtype != torch.float32 and x_BH.is_cuda:
        return torch.mm(x_BH, w_VH.T, out_dtype=torch.float32)
    return F.linear(x_BH.float(), w_VH.float())


# ------------------------------------------------------------------------------------------------- device side


class Cache:
    """The arena: pages of PAGE tokens for every layer; page 0 takes what rows that have ended still write."""

    def __init__(self, config, pages: int, dtype, device):
        shape = (config.num_hidden_layers, pages, PAGE, config.num_key_value_heads, config.head_dim)
        self.k_LPSKD, self.v_LPSKD = (torch.empty(shape, dtype=dtype, device=device) for _ in range(2))
        self.k, self.v = self.k_LPSKD.unbind(), self.v_LPSKD.unbind()
        self.slots = [(k.flatten(0, 1), v.flatten(0, 1)) for k, v in zip(self.k, self.v, strict=True)]

    def write(self, layer: int, slot_T, k_TKD, v_TKD) -> None:
        k_slots, v_slots = self.slots[layer]
        k_slots.index_copy_(0, slot_T, k_TKD)
        v_slots.index_copy_(0, slot_T, v_TKD)

    def copy(self, pairs: list[tuple[int, int]]) -> None:
        """Copy whole pages, given as (from, to)."""
        source_C, target_C = torch.tensor(pairs, device=self.k_LPSKD.device).T
        for arena in (self.k_LPSKD, self.v_LPSKD):
            arena[:, target_C] = arena[:, source_C]


class State:
    """Static buffers of the decode step, one line a row. `length` counts cached tokens, `count` drawn ones."""

    def __init__(self, rows: int, pages_a_row: int, window: int, eos_ids: list[int], device):
        def zeros(*shape, dtype=torch.int64):
            return torch.zeros(shape, dtype=dtype, device=device)

        self.rows = {name: zeros(rows) for name in ("token", "length", "key", "count", "limit")}
        self.rows |= {
            "live": zeros(rows, dtype=torch.bool),
            "table": zeros(rows, pages_a_row, dtype=torch.int32),
            "ids": zeros(rows, window),
            "logp": zeros(rows, window, dtype=torch.float32),
        }
        self.step = zeros(1)  # column of `ids` and `logp` that the next step writes
        self.cu_seqlens = torch.arange(rows + 1, dtype=torch.int32, device=device)
        self.eos_E = torch.tensor(eos_ids, dtype=torch.int64, device=device)
        self.knobs = SimpleNamespace(
            temperature=torch.ones((), device=device), top_k=zeros(), top_p=torch.ones((), device=device)
        )

    def first(self, rows: int) -> SimpleNamespace:
        return SimpleNamespace(**{name: buffer[:rows] for name, buffer in self.rows.items()})

    def set_knobs(self, temperature: float, top_p: float, top_k: int) -> None:
        for name, value in (("temperature", temperature), ("top_p", top_p), ("top_k", top_k)):
            getattr(self.knobs, name).fill_(value)

    def load(self, rows: int, columns: dict) -> None:
        for name, values in columns.items():
            self.rows[name][:rows].copy_(torch.as_tensor(values))

    def read(self, rows: int, steps: int) -> list[list]:
        s = self.first(rows)
        return [x.tolist() for x in (s.count, s.live, s.ids[:, :steps], s.logp[:, :steps])]


@torch.inference_mode()
def decode_step(transformer, cache: Cache, state: State, rows: int, mode: str) -> None:
    """One token for each of the first `rows` rows that is live; reads and writes only tensors of cache and state."""
    s = state.first(rows)
    page_B = s.table.gather(1, (s.length // PAGE)[:, None]).squeeze(1)
    slot_B = torch.where(s.live, page_B * PAGE + s.length % PAGE, 0)
    lengths_B = torch.where(s.live, s.length + 1, 0).int()

    def attend(layer, q_BHD, k_BKD, v_BKD):
        cache.write(layer, slot_B, k_BKD, v_BKD)
        return kernels.decode_attention(q_BHD, cache.k[layer], cache.v[layer], s.table, lengths_B)

    x_BH = transformer(s.token, state.cu_seqlens[: rows + 1], positions_T=s.length, attend=attend)
    logits_BV = head_logits(x_BH, transformer.head_weight)
    token_B, logp_B = draw(logits_BV, uniform(s.key, s.count), state.knobs, mode)
    s.ids.index_copy_(1, state.step, token_B[:, None])
    s.logp.index_copy_(1, state.step, logp_B[:, None])
    state.step += 1
    s.token.copy_(token_B)
    s.length += s.live
    s.count += s.live
    ended_B = (token_B[:, None] == state.eos_E).any(1) | (s.count >= s.limit)
    s.live.logical_and_(~ended_B)


# ------------------------------------------------------------------------------------------------- host side


def pages_for(tokens: int) -> int:
    return -(-tokens // PAGE)


class Pages:
    """Page numbers with counted references; page 0 is never given out."""

    def __init__(self, total: int):
        self.free, self.references = list(range(total - 1, 0, -1)), [0] * total

    def take(self, n: int) -> list[int]:
        taken = [self.free.pop() for _ in range(n)]
        return self.share(taken)

    def share(self, pages: list[int]) -> list[int]:
        for page in pages:
            self.references[page] += 1
        return list(pages)

    def drop(self, pages: list[int]) -> None:
        for page in pages:
            self.references[page] -= 1
            if self.references[page] == 0:
                self.free.append(page)


@dataclass(slots=True, eq=False)
class Group:
    """A prompt and the samples of it that have not begun; `pages` hold its first len(prompt) - 1 tokens once set."""

    index: int
    prompt: list[int]
    limit: int
    waiting: deque
    pages: list[int] | None = None

    @property
    def cached(self) -> int:
        return len(self.prompt) - 1


@dataclass(slots=True, eq=False)
class Row:
    """A sample under way; `pages` is None once it has ended or was sent back to start over."""

    group: Group
    k: int
    key: int
    pages: list[int] | None
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    @property
    def length(self) -> int:
        return self.group.cached + len(self.ids)


class Rollout:
    """The scheduler of one call: admits samples as rows and pages come free, and collects what the steps drew."""

    def __init__(self, engine: "Engine", groups: list[Group], keys: list[list[int]], mode: str, stop, finished):
        self.engine, self.keys, self.mode, self.stop, self.finished = engine, keys, mode, stop, finished
        self.waiting, self.rows = deque(groups), []
        self.pages = Pages(engine.pages)
        self.changed = True

    def run(self) -> None:
        while self.waiting or self.rows:
            self.admit()
            self.grow()
            if self.changed:
                self.upload()
            steps = min(self.engine.look, max(row.group.limit - len(row.ids) for row in self.rows))
            self.engine.advance(len(self.rows), steps, self.mode)
            self.collect(steps)

    def admit(self) -> None:
        """Start waiting samples while a row is free and every running row keeps a page to grow into."""
        fresh, copies = [], []
        while self.waiting and len(self.rows) < self.engine.max_rows:
            group = self.waiting[0]
            need = 1 + (pages_for(group.cached) if group.pages is None else 0)
            if need + len(self.rows) > len(self.pages.free):
                if self.rows:
                    break
                self.make_room(need)
            if group.pages is None:
                group.pages = self.pages.take(pages_for(group.cached))
                fresh.append((group.prompt[:-1], group.pages))
            self.start(group, copies)
        self.engine.prefill([(ids, pages) for ids, pages in fresh if ids])
        if copies:
            self.engine.cache.copy(copies)

    def start(self, group: Group, copies: list[tuple[int, int]]) -> None:
        """Make the group's next sample a row: it shares the full pages and gets its own copy of the partial one."""
        k = group.waiting.popleft()
        if group.waiting:
            pages = self.pages.share(group.pages[: group.cached // PAGE])
            for partial in group.pages[group.cached // PAGE :]:
                pages += self.pages.take(1)
                copies.append((partial, pages[-1]))
        else:  # the last one takes what the group holds
            pages, group.pages = group.pages, None
            self.waiting.popleft()
        self.rows.append(Row(group, k, self.keys[group.index][k], pages))
        self.changed = True

    def grow(self) -> None:
        """Pages for the steps until the next look, the longest rows first, so that the call always gets on."""
        for row in sorted(self.rows, key=lambda row: -len(row.ids)):
            last = min(row.length + self.engine.look, row.group.cached + row.group.limit)
            if row.pages is None or pages_for(last) <= len(row.pages):
                continue
            missing = pages_for(last) - len(row.pages)
            self.make_room(missing)
            if row.pages is not None:
                row.pages += self.pages.take(missing)
                self.changed = True

    def make_room(self, need: int) -> None:
        """Free `need` pages: prompts held for later samples go first, then the shortest rows, which start over.

        A row that starts over draws the same numbers again, so nothing but time is lost.
        """
        spared = 0 if self.rows else 1  # with no row running, room is made for the first group
        for group in list(self.waiting)[spared:]:
            if len(self.pages.free) < need and group.pages is not None:
                self.pages.drop(group.pages)
                group.pages = None
        while len(self.pages.free) < need:
            row = min(self.rows, key=lambda row: len(row.ids))
            self.waiting.appendleft(Group(row.group.index, row.group.prompt, row.group.limit, deque([row.k])))
            self.end(row)

    def end(self, row: Row) -> None:
        self.pages.drop(row.pages)
        row.pages = None
        self.rows.remove(row)
        self.changed = True

    def upload(self) -> None:
        """Write the rows into the static buffers, live ones first: this is also what compacts a shrinking batch."""
        rows = self.engine.prepare(len(self.rows), self.mode)
        table = np.zeros((rows, self.engine.pages_a_row), dtype=np.int32)
        for line, row in zip(table, self.rows, strict=False):
            line[: len(row.pages)] = row.pages
        columns = {
            "token": [row.ids[-1] if row.ids else row.group.prompt[-1] for row in self.rows],
            "length": [row.length for row in self.rows],
            "key": [row.key for row in self.rows],
            "count": [len(row.ids) for row in self.rows],
            "limit": [row.group.limit for row in self.rows],
            "live": [True] * len(self.rows),
        }
        idle = [0] * (rows - len(self.rows))
        self.engine.state.load(rows, {name: values + idle for name, values in columns.items()} | {"table": table})
        self.changed = False

    def collect(self, steps: int) -> None:
        """Read the last steps' tokens; rows that ended leave."""
        count_B, live_B, ids_BW, logp_BW = self.engine.state.read(len(self.rows), steps)
        for row, count, live, ids, logp in zip(list(self.rows), count_B, live_B, ids_BW, logp_BW, strict=True):
            new = count - len(row.ids)
            if not math.isfinite(sum(logp[:new])):
                raise EngineError(f"prompt {row.group.index}, sample {row.k}: the model's logits are not finite")
            row.ids += ids[:new]
            row.logprobs += logp[:new]
            stopped = self.stop is not None and self.stop(row, new)
            if stopped or not live:
                self.end(row)
                self.finished(row, "stop" if stopped or row.ids[-1] in self.engine.eos_ids else "length")


# ------------------------------------------------------------------------------------------------- engine


class Engine:
    """Samples from `transformer` as it is at the time of each call; an update of its weights needs no message.

    eos_ids: ids that end a sample, with the stop token kept (`generation_config.json` has them). max_rows: samples
    decoded at a time. max_context: longest prompt + completion (default: the model's). cache_bytes: size of the arena
    of pages, allocated at the first call and kept, like the CUDA graphs (default: GPU_SHARE of the free GPU memory, or
    CPU_CACHE_BYTES; never more than max_rows full contexts). low_memory gives both back after each call.
    """

    def __init__(self, transformer, eos_ids, *, max_rows=256, max_context=None, cache_bytes=None, low_memory=False):
        config, weight = transformer.config, transformer.head_weight
        self.transformer, self.eos_ids, self.low_memory = transformer, frozenset(eos_ids), low_memory
        self.dtype, self.device = weight.dtype, weight.device
        self.max_context = max_context or config.max_position_embeddings
        self.max_rows = max_rows if self.device.type == "cuda" else -(-max_rows // ROW_TILE) * ROW_TILE
        self.look = LOOK[self.device.type]
        self.pages_a_row = pages_for(self.max_context)
        self.page_bytes = 2 * config.num_hidden_layers * PAGE * config.num_key_value_heads * config.head_dim
        self.page_bytes *= weight.element_size()
        self.cache_bytes, self.pages = cache_bytes, 0
        self.cache, self.state, self.graphs, self.weights = None, None, {}, None

    # ---- the call

    def generate(
        self, prompts, n=1, max_tokens=512, temperature=1.0, seed=0, *, logprobs=True, top_p=1.0, top_k=0, stop=(),
        decode=None, on_done=None,
    ):  # fmt: skip
        """For each prompt (a list of token ids, which may end in a given start of the assistant's turn) n Samples.

        max_tokens: limit of each completion, one for all or a list. temperature 0 is greedy. top_p and top_k (0: off)
        need logprobs=False: their distribution is not the trainer's. stop: strings that end a sample, looked for in
        decode(ids); the token that completes one is the last. on_done(prompt index, k, sample) is called as samples
        end. Raises EngineError before anything runs; and, with the sample's place, when logits are not finite.
        """
        limits = list(max_tokens) if isinstance(max_tokens, (list, tuple)) else [max_tokens] * len(prompts)
        self._size()
        self._check(prompts, n, limits, temperature, logprobs, top_p, top_k, stop, decode)
        done = [[None] * n for _ in prompts]

        def finished(row, reason):
            done[row.group.index][row.k] = sample = Sample(row.ids, row.logprobs if logprobs else None, reason)
            if on_done is not None:
                on_done(row.group.index, row.k, sample)

        groups = [Group(i, prompt, limits[i], deque(range(n))) for i, prompt in enumerate(prompts)]
        mode = "greedy" if temperature == 0 else "filtered" if top_p < 1 or top_k > 0 else "sample"
        watch = stop_watch(stop, decode) if stop else None
        with torch.inference_mode():
            self._open()
            self.state.set_knobs(temperature or 1.0, top_p, top_k or self.transformer.config.vocab_size)
            Rollout(self, groups, stream_keys(seed, len(prompts), n), mode, watch, finished).run()
        if self.low_memory:
            self.close()
        return done

    def _check(self, prompts, n, limits, temperature, logprobs, top_p, top_k, stop, decode) -> None:
        wrong = []
        if n < 1:
            wrong.append(f"n={n}: at least one sample a prompt")
        if not (temperature >= 0 and math.isfinite(temperature)):
            wrong.append(f"temperature={temperature}: a finite number, 0 for greedy")
        if not 0 < top_p <= 1 or top_k < 0:
            wrong.append(f"top_p={top_p} must be in (0, 1], top_k={top_k} at least 0")
        if logprobs and (top_p < 1 or top_k > 0):
            wrong.append("top_p and top_k change the distribution: use them with logprobs=False")
        if stop and decode is None:
            wrong.append("stop strings need decode, such as tokenizer.decode")
        if len(limits) != len(prompts):
            wrong.append(f"{len(limits)} limits in max_tokens for {len(prompts)} prompts")
        bad = [f"prompt {i}: {why}" for i, (p, m) in enumerate(zip(prompts, limits, strict=False))
               if (why := self._misfit(p, m, n))]  # fmt: skip
        wrong += bad[:3] + ([f"and {len(bad) - 3} more prompts"] if len(bad) > 3 else [])
        if wrong:
            raise EngineError("; ".join(wrong))

    def _misfit(self, prompt, limit, n) -> str | None:
        """Why this request can never run, if so."""
        vocab, total = self.transformer.config.vocab_size, len(prompt) + limit
        if not prompt:
            return "empty"
        if min(prompt) < 0 or max(prompt) >= vocab:
            return f"ids from {min(prompt)} to {max(prompt)} in a vocabulary of {vocab}"
        if limit < 1:
            return f"max_tokens={limit}: at least 1"
        if total > self.max_context:
            return f"{len(prompt)} tokens + max_tokens={limit} is {total}, over the context of {self.max_context}"
        if (need := pages_for(total - 1) + (n > 1)) > self.pages - 1:
            return (f"needs {need} pages of {self.page_bytes} bytes; the cache of {self.cache_bytes} bytes has "
                    f"{max(0, self.pages - 1)}")  # fmt: skip
        return None

    # ---- memory

    def _size(self) -> None:
        """Fix the number of pages, once."""
        if self.cache_bytes is None and self.device.type == "cuda":
            self.cache_bytes = int(GPU_SHARE * torch.cuda.mem_get_info(self.device)[0])
        elif self.cache_bytes is None:
            self.cache_bytes = CPU_CACHE_BYTES
        most = (self.max_rows + 1) * (self.pages_a_row + 1)
        self.pages = min(self.cache_bytes // self.page_bytes, most)

    def _open(self) -> None:
        """Allocate what is not there; forget graphs that read weights which have moved."""
        weights = [p.data_ptr() for p in self.transformer.parameters()]
        if weights != self.weights:
            self.graphs, self.weights = {}, weights
        if self.cache is None:
            start = time.perf_counter()
            self.cache = Cache(self.transformer.config, self.pages, self.dtype, self.device)
            self.state = State(self.max_rows, self.pages_a_row, self.look, sorted(self.eos_ids), self.device)
            if self.low_memory:
                self._say(f"{self.pages * self.page_bytes / 2**30:.2f} GiB of cache allocated", start)

    def close(self) -> None:
        """Give the arena and the graphs back; the next call allocates and captures again."""
        self.cache, self.state, self.graphs = None, None, {}
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _say(self, what: str, start: float) -> None:
        print(f"engine: {what} in {time.perf_counter() - start:.2f} s (low_memory)", file=sys.stderr)

    # ---- running the model

    def prefill(self, prompts: list[tuple[list[int], list[int]]]) -> None:
        """Write keys and values of (ids, pages) into the cache, packed, about PREFILL_TOKENS at a time."""
        batch, tokens = [], 0
        for ids, pages in prompts:
            if batch and tokens + len(ids) > PREFILL_TOKENS:
                self._prefill(batch)
                batch, tokens = [], 0
            batch.append((ids, pages))
            tokens += len(ids)
        if batch:
            self._prefill(batch)

    def _prefill(self, batch) -> None:
        ids, slots, ends = [], [], [0]
        for prompt, pages in batch:
            ids += prompt
            slots += [pages[i // PAGE] * PAGE + i % PAGE for i in range(len(prompt))]
            ends.append(len(ids))
        if self.device.type == "cpu" and len(ids) % ROW_TILE:  # a document of its own, kept in page 0
            idle = -len(ids) % ROW_TILE
            ids, slots = ids + [0] * idle, slots + list(range(idle))
            ends.append(len(ids))
        slot_T = torch.tensor(slots, device=self.device)
        cu_seqlens = torch.tensor(ends, dtype=torch.int32, device=self.device)
        longest = max(b - a for a, b in zip(ends, ends[1:], strict=False))

        def attend(layer, q_THD, k_TKD, v_TKD):
            self.cache.write(layer, slot_T, k_TKD, v_TKD)
            return kernels.attention(q_THD, k_TKD, v_TKD, cu_seqlens, longest)

        self.transformer(torch.tensor(ids, device=self.device), cu_seqlens, attend=attend)

    def bucket(self, rows: int) -> int:
        """Rows that a step computes for `rows` live ones: a tile's multiple on a CPU, else 1, 2, 4, 8, 12, 16, 24..."""
        if self.device.type == "cpu":
            return -(-rows // ROW_TILE) * ROW_TILE
        power = 1 << (rows - 1).bit_length()
        return min(self.max_rows, power * 3 // 4 if power >= 16 and rows <= power * 3 // 4 else power)

    def prepare(self, rows: int, mode: str) -> int:
        """The bucket for `rows`, its graph captured; called before the rows are written."""
        rows = self.bucket(rows)
        if self._captures and (rows, mode) not in self.graphs:
            self._capture(rows, mode)
        return rows

    @property
    def _captures(self) -> bool:
        return self.device.type == "cuda" and kernels.backend(self.device) == "triton"

    def _capture(self, rows: int, mode: str) -> None:
        """One CUDA graph of decode_step; no row is live meanwhile, so that nothing but page 0 and the window changes."""
        start = time.perf_counter()
        self.state.rows["live"].zero_()
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            for _ in range(2):  # compiles and tunes kernels, which a capture cannot
                self.state.step.zero_()
                decode_step(self.transformer, self.cache, self.state, rows, mode)
        torch.cuda.current_stream(self.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        pool = next(iter(self.graphs.values())).pool() if self.graphs else None
        with torch.cuda.graph(graph, pool=pool):
            decode_step(self.transformer, self.cache, self.state, rows, mode)
        self.graphs[rows, mode] = graph
        if self.low_memory:
            self._say(f"graph of {rows} rows captured", start)

    def advance(self, rows: int, steps: int, mode: str) -> None:
        """`steps` decode steps of the bucket that holds `rows`."""
        rows = self.bucket(rows)
        self.state.step.zero_()
        for _ in range(steps):
            if self._captures:
                self.graphs[rows, mode].replay()
            else:
                decode_step(self.transformer, self.cache, self.state, rows, mode)


def stop_watch(stop, decode):
    """A function(row, new) that cuts a row after the token that completes a stop string, and says whether it did."""
    tail = 8 + max(len(text.encode()) for text in stop)  # a token is at least a byte, some decode to nothing

    def cut(row: Row, new: int) -> bool:
        for end in range(len(row.ids) - new + 1, len(row.ids) + 1):
            text = decode(row.ids[max(0, end - tail) : end])
            if any(string in text for string in stop):
                del row.ids[end:], row.logprobs[end:]
                return True
        return False

    return cut
