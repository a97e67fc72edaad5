"""Sampler over the module that is being trained: paged cache, continuous batching, log-probs of what was drawn.

A prompt is prefilled once, packed with others, and its n samples share the full pages. Its last token is not
prefilled: it is the input of each sample's first decode step, so that every token comes out of one function.

    prompt of 70 ids, n = 2:   page 0 (ids 0-63) shared, page 1 (ids 64-68) copied, id 69 fed to the first step

`decode_step` is that function, on static buffers: eager on a CPU, a CUDA graph per number of rows on a GPU; the host
looks at the results every few steps. A draw is keyed by (seed, index of the prompt in the call, k, position). On a
CPU in fp32 a sample is bitwise the same in any batch: attention takes each row by itself, everything else runs on
whole tiles of ROW_TILE rows, because products of fewer rows go through other kernels, which sum in another order.
Engine(row_tile=1) gives that up, for speed where rows are few.
"""

import hashlib
import math
from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate
from types import SimpleNamespace

import numpy as np
import torch

import kernels
import model
import safety
from kernels.sample import mix
from runs import UserError

PAGE = 64  # tokens a page, as in kernels.decode_attention
ROW_TILE = 16  # rows of a CPU step and tokens of a CPU prefill are a multiple of this, where row_tile says no other
LOOK = {"cpu": 4, "cuda": 16}  # decode steps between two looks of the host
MAX_ROWS = 512  # samples that are decoded at a time, where the caller says nothing
PREFILL_TOKENS = 8192  # prompts that are prefilled together; one longer prompt goes alone
GPU_SHARE = 0.6  # of the free GPU memory, where the caller gives no cache_bytes
CPU_CACHE_BYTES = 2 << 30  # the same on a CPU, where memory that is never written costs nothing


class EngineError(UserError):
    """A request that cannot be run, or weights that give no distribution; the message has the numbers."""


@dataclass(slots=True)
class Sample:
    """One completion. `ids` include the stop token; `logprobs` (nats, one an id) are under the distribution that was
    drawn from, temperature 1 for greedy, None where not asked for; finish_reason is "stop" or "length"."""

    ids: list[int]
    logprobs: list[float] | None
    finish_reason: str


# ------------------------------------------------------------------------------------------------- drawing a token
def stream_keys(seed: int, places: list[int], n: int) -> list[list[int]]:
    """An int64 key for each (place of a prompt, k): [places][n]."""
    key_P1 = mix(mix(torch.tensor(seed % 2**63)) ^ torch.tensor(places, dtype=torch.int64)[:, None])
    return mix(key_P1 ^ torch.arange(n)).tolist()


def head_logits(x_BH: torch.Tensor, w_VH: torch.Tensor) -> torch.Tensor:
    """[B,V] fp32, never rounded to half precision: the trainer's linear_logp does not round them either."""
    if x_BH.dtype != torch.float32 and x_BH.is_cuda:
        return torch.mm(x_BH, w_VH.T, out_dtype=torch.float32)
    return model.linear(x_BH.float(), w_VH.float())


# ------------------------------------------------------------------------------------------------- device side
class Cache:
    """The arena: pages of PAGE tokens for every layer. Page 0 takes what rows that have ended still write."""

    def __init__(self, transformer, pages: int):
        config = transformer.config
        shape = (config.num_hidden_layers, pages, PAGE, config.num_key_value_heads, config.head_dim)
        self.k_LPSKD, self.v_LPSKD = (transformer.head_weight.new_empty(shape) for _ in range(2))
        self.layers = list(zip(self.k_LPSKD, self.v_LPSKD, strict=True))
        self.slots = [(k_PSKD.flatten(0, 1), v_PSKD.flatten(0, 1)) for k_PSKD, v_PSKD in self.layers]

    def write(self, layer: int, slot_T, k_TKD, v_TKD) -> None:
        for arena_SKD, new_TKD in zip(self.slots[layer], (k_TKD, v_TKD), strict=True):
            arena_SKD.index_copy_(0, slot_T, new_TKD)

    def copy(self, pages: list[tuple[int, int, int]]) -> None:
        """Copy the first `used` slots of pages, given as (from, to, used), in all layers."""
        slots = [(source * PAGE + i, target * PAGE + i) for source, target, used in pages for i in range(used)]
        source_C, target_C = torch.tensor(slots, device=self.k_LPSKD.device).T.contiguous()
        for arena_LPSKD in (self.k_LPSKD, self.v_LPSKD):
            arena_LTKD = arena_LPSKD.flatten(1, 2)
            arena_LTKD.index_copy_(1, target_C, arena_LTKD.index_select(1, source_C))


COLUMNS = ("token", "length", "key", "count", "limit", "live")  # of a row; `table`, its pages, comes behind them


class State:
    """Static buffers of the decode step, a line a row; `length` counts cached tokens, `count` drawn ones."""

    def __init__(self, rows: int, pages_a_row: int, window: int, eos_ids, device):
        zeros = partial(torch.zeros, device=device)
        self.rows = {name: zeros(rows, dtype=torch.int64) for name in COLUMNS[:-1]}
        self.rows["live"] = zeros(rows, dtype=torch.bool)
        self.rows["table"] = zeros(rows, pages_a_row, dtype=torch.int32)
        self.rows["ids"] = zeros(rows, window, dtype=torch.int64)
        self.rows["logp"] = zeros(rows, window, dtype=torch.float32)
        self.step = zeros(1, dtype=torch.int64)  # the column of `ids` and `logp` that the next step writes
        self.cu_seqlens = torch.arange(rows + 1, dtype=torch.int32, device=device)
        self.eos_E = torch.tensor(sorted(eos_ids), dtype=torch.int64, device=device)
        self.knobs = SimpleNamespace(temperature=zeros(()), top_p=zeros(()))

    def first(self, rows: int) -> SimpleNamespace:
        return SimpleNamespace(**{name: buffer[:rows] for name, buffer in self.rows.items()})

    def load(self, host_BC: torch.Tensor) -> None:
        new_BC = host_BC.to(self.step.device)
        for i, name in enumerate(COLUMNS):
            self.rows[name][: len(new_BC)].copy_(new_BC[:, i])
        self.rows["table"][: len(new_BC)].copy_(new_BC[:, len(COLUMNS) :])


@torch.inference_mode()
def decode_step(transformer, cache: Cache, state: State, rows: int, mode: str) -> None:
    """One token for each live one of the first `rows` rows; reads and writes nothing but cache and state."""
    s = state.first(rows)
    page_B = s.table.gather(1, (s.length // PAGE)[:, None]).squeeze(1)
    slot_B = torch.where(s.live, page_B * PAGE + s.length % PAGE, 0)
    lengths_B = torch.where(s.live, s.length + 1, 0).int()
    plan = kernels.decode_plan(s.table, lengths_B)

    def attend(layer, rotate):
        q_BHD = rotate(cache=(slot_B, *cache.slots[layer]))
        return kernels.decode_attention(q_BHD, *cache.layers[layer], s.table, lengths_B, plan)

    x_BH = transformer(s.token, state.cu_seqlens[: rows + 1], positions_T=s.length, attend=attend)
    logits_BV = head_logits(x_BH, transformer.head_weight)
    kernels.sample(logits_BV, s, state.step, state.eos_E, state.knobs, mode)
    state.step += 1


# ------------------------------------------------------------------------------------------------- host side
def pages_for(tokens: int) -> int:
    return -(-tokens // PAGE)


def slots_of(ids: list[int], pages: list[int]) -> np.ndarray:
    """[2,T] int64 of a document in these pages: ids, slots of the arena."""
    position_T = np.arange(len(ids))
    slot_T = np.array(pages, dtype=np.int64)[position_T // PAGE] * PAGE + position_T % PAGE
    return np.stack([np.array(ids, dtype=np.int64), slot_T])


class Pages:
    """Page numbers with counted references; page 0 is never given out."""

    def __init__(self, total: int):
        self.free, self.references = list(range(total - 1, 0, -1)), Counter()

    def take(self, n: int) -> list[int]:
        return self.share([self.free.pop() for _ in range(n)])

    def share(self, pages: list[int]) -> list[int]:
        self.references.update(pages)
        return list(pages)

    def drop(self, pages: list[int]) -> None:
        self.references.subtract(pages)
        self.free += [page for page in pages if self.references[page] == 0]


@dataclass(slots=True, eq=False)
class Group:
    """A prompt and its samples that have not begun; `pages` hold its first `cached` tokens, once it is prefilled."""

    index: int
    prompt: list[int]
    cached: int  # all but the last
    limit: int
    keys: list[int]  # of the random numbers, one a sample
    waiting: deque[int]
    pages: list[int] | None = None


@dataclass(slots=True, eq=False)
class Row:
    """A sample under way; `pages` is None once it has ended or was sent back to start over."""

    group: Group
    k: int
    pages: list[int] | None
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


class Rollout:
    """The scheduler of one call: admits samples as rows and pages come free, and yields what the steps drew."""

    def __init__(self, engine: "Engine", groups: list[Group], mode: str, logprobs: bool, partial: bool):
        self.engine, self.mode, self.logprobs, self.partial = engine, mode, logprobs, partial
        self.waiting, self.rows, self.pages = deque(groups), [], Pages(engine.pages)
        self.changed = False  # since the rows were last written to the device

    @torch.inference_mode()  # never in force while the caller works on what was yielded
    def run(self, call: int) -> Iterator[tuple[int, int, Sample]]:
        while self.waiting or self.rows:
            if self.engine.calls != call:
                raise EngineError("the engine has begun another call or was closed, so this stream cannot go on")
            self.admit()
            self.grow()
            if self.changed:
                self.upload()
            steps = min(self.engine.look, max(row.group.limit - len(row.ids) for row in self.rows))
            self.engine.advance(steps)
            yield from self.collect(steps)
            for row in self.rows if self.partial else ():
                yield row.group.index, row.k, Sample(list(row.ids), None, "")

    def admit(self) -> None:
        """Start waiting samples while a row is free and every running row keeps a page to grow into."""
        fresh, copies = [], []
        while self.waiting and len(self.rows) < self.engine.max_rows:
            group = self.waiting[0]
            missing = pages_for(group.cached) if group.pages is None else 0
            need = (len(group.waiting) > 1) + missing
            if self.rows and need + 1 + len(self.rows) > len(self.pages.free):
                break
            self.make_room(need)
            if group.pages is None:
                group.pages = self.pages.take(missing)
                fresh.append((group.prompt[:-1], group.pages))
            self.start(group, copies)
        self.engine.prefill([(ids, pages) for ids, pages in fresh if ids])
        if copies:
            self.engine.cache.copy(copies)

    def start(self, group: Group, copies: list[tuple[int, int, int]]) -> None:
        """Make the group's next sample a row: it shares the full pages and gets a copy of the partial one."""
        k, full = group.waiting.popleft(), group.cached // PAGE
        if group.waiting:
            pages = self.pages.share(group.pages[:full]) + self.pages.take(len(group.pages) - full)
            copies += [(*pair, group.cached % PAGE) for pair in zip(group.pages[full:], pages[full:], strict=True)]
        else:  # the last sample takes over what the group holds
            pages, group.pages = group.pages, None
            self.waiting.popleft()
        self.rows.append(Row(group, k, pages))
        self.changed = True

    def grow(self) -> None:
        """Pages for the steps until the next look; the longest row comes first, so that the call always gets on."""
        for row in sorted(self.rows, key=lambda row: -len(row.ids)):
            if row.pages is None:
                continue
            tokens = row.group.cached + min(len(row.ids) + self.engine.look, row.group.limit)
            missing = max(0, pages_for(tokens) - len(row.pages))
            self.make_room(missing)
            if missing and row.pages is not None:
                row.pages += self.pages.take(missing)
                self.changed = True

    def make_room(self, need: int) -> None:
        """Free `need` pages: prompts held for later samples go first, then the shortest rows, which start over.

        A row that starts over draws the same numbers again, so nothing is lost but time.
        """
        first = 0 if self.rows else 1  # with no row running, the room is for the first group
        for group in list(self.waiting)[first:] if len(self.pages.free) < need else ():
            self.pages.drop(group.pages or [])
            group.pages = None
        while len(self.pages.free) < need:
            row = min(self.rows, key=lambda row: len(row.ids))
            self.waiting.appendleft(replace(row.group, waiting=deque([row.k]), pages=None))
            self.end(row)
            self.rows.remove(row)

    def end(self, row: Row) -> None:
        self.pages.drop(row.pages)
        row.pages = None
        self.changed = True

    def upload(self) -> None:
        """Write the rows to the static buffers, without holes: this is also what compacts a shrinking batch."""
        lines = self.engine.prepare(len(self.rows), self.mode)
        host = np.zeros((lines, len(COLUMNS) + self.engine.pages_a_row), dtype=np.int64)
        for line, row in zip(host[: len(self.rows)], self.rows, strict=True):
            group, count = row.group, len(row.ids)
            last = row.ids[-1] if row.ids else group.prompt[-1]
            line[: len(COLUMNS)] = last, group.cached + count, group.keys[row.k], count, group.limit, True
            line[len(COLUMNS) :][: len(row.pages)] = row.pages
        self.engine.state.load(torch.from_numpy(host))
        self.changed = False

    def collect(self, steps: int) -> list[tuple[int, int, Sample]]:
        """Read what the last steps drew; rows that ended leave and are returned."""
        s, ended = self.engine.state.first(len(self.rows)), []
        drawn = [x.tolist() for x in (s.count, s.live, s.ids[:, :steps], s.logp[:, :steps])]
        for row, count, live, ids, logp in zip(self.rows, *drawn, strict=True):
            new = count - len(row.ids)
            if not math.isfinite(sum(logp[:new])):
                raise EngineError(f"prompt {row.group.index}, sample {row.k}: the model's logits are not finite")
            row.ids += ids[:new]
            row.logprobs += logp[:new]
            if not live:
                self.end(row)
                reason = "stop" if row.ids[-1] in self.engine.eos_ids else "length"
                sample = Sample(row.ids, row.logprobs if self.logprobs else None, reason)
                ended.append((row.group.index, row.k, sample))
        self.rows = [row for row in self.rows if row.pages is not None]
        return ended


# ------------------------------------------------------------------------------------------------- engine
class Engine:
    """Samples from `transformer` as it is at each call: nothing is copied, so an update of the weights needs no sync.

    eos_ids: ids that end a sample (model.end_ids). max_rows: samples decoded at a time. max_context: longest prompt
    plus completion (default: the model's; a step's workspace on a GPU grows with it, so give what is needed).
    cache_bytes: the arena of pages, allocated at the first call and kept, like the CUDA graphs (default: GPU_SHARE of
    the free GPU memory or CPU_CACHE_BYTES, and no more than max_rows contexts need), so give it where two engines share
    a GPU, or train beside one. row_tile: 1 leaves out what fills a CPU's tiles of ROW_TILE rows; then the roundings of
    a sample depend on its batch.
    """

    def __init__(
        self, transformer, eos_ids, *, max_rows=MAX_ROWS, max_context=None, cache_bytes=None, row_tile=ROW_TILE
    ):  # fmt: skip
        config, weight = transformer.config, transformer.head_weight
        self.transformer, self.eos_ids = transformer, frozenset(eos_ids)
        self.device, self.cpu, self.look = weight.device, weight.device.type == "cpu", LOOK[weight.device.type]
        self.tile = row_tile if self.cpu else 1
        self.max_rows = -(-max_rows // self.tile) * self.tile
        self.max_context = max_context or config.max_position_embeddings
        self.pages_a_row = pages_for(self.max_context)
        token_values = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        self.page_bytes = PAGE * token_values * weight.element_size()
        if cache_bytes is None and not self.cpu:
            torch.cuda.empty_cache()  # blocks that torch keeps for itself do not count as free
            cache_bytes = int(GPU_SHARE * torch.cuda.mem_get_info(self.device)[0])
        cache_bytes = CPU_CACHE_BYTES if cache_bytes is None else cache_bytes
        self.pages = min(cache_bytes // self.page_bytes, 1 + self.max_rows * (self.pages_a_row + 1))
        self.cache, self.state, self.graphs, self.weights, self.step = None, None, {}, None, None
        self.calls = 0  # so far; the last one holds the rows and the cache

    def generate(self, prompts, n=1, *arguments, **settings) -> list[list[Sample]]:
        """All n Samples of each prompt, in order; the arguments are those of `stream`."""
        done = [[None] * n for _ in prompts]
        for index, k, sample in self.stream(prompts, n, *arguments, **settings):
            done[index][k] = sample
        return done

    def stream(
        self, prompts, n=1, max_tokens=512, temperature=1.0, seed=0, *, logprobs=True, top_p=1.0, places=None,
        partial=False,
    ) -> Iterator[tuple[int, int, Sample]]:  # fmt: skip
        """(prompt index, k, Sample) of n samples for each prompt, a list of token ids, as they end.

        A prompt may end in a given start of the answer. max_tokens: limit of every completion, or a list with one a
        prompt. temperature 0 is greedy. top_p needs logprobs=False, for its distribution is not the trainer's. places:
        the prompts' places in the random stream (default 0, 1, ...), so that a call for what an earlier one has left
        undone draws what that one would have. partial: between whole ones also every Sample so far, with finish_reason
        "", each time the host looks. Raises EngineError at the call for what could not run, and while it runs
        where logits are not finite. An engine runs one stream at a time: a new call ends the one before.
        """
        limits = list(max_tokens) if isinstance(max_tokens, (list, tuple)) else [max_tokens] * len(prompts)
        places = list(range(len(prompts)) if places is None else places)
        self._check(prompts, n, limits, temperature, logprobs, top_p, places)
        self._open(temperature or 1.0, top_p)
        keys = stream_keys(seed, places, n)
        groups = [Group(i, list(p), len(p) - 1, limits[i], keys[i], deque(range(n))) for i, p in enumerate(prompts)]
        mode = "greedy" if temperature == 0 else "top_p" if np.float32(top_p) < 1 else "sample"
        self.calls += 1
        return Rollout(self, groups, mode, logprobs, partial).run(self.calls)

    def _check(self, prompts, n, limits, temperature, logprobs, top_p, places) -> None:
        """Raises EngineError for a call that could not run."""
        if n < 1 or not 0 <= temperature < math.inf or not 0 < top_p <= 1:
            given = f"n={n}, temperature={temperature}, top_p={top_p}"
            raise EngineError(f"{given}: n from 1, temperature from 0 (greedy) to any finite number, top_p in (0, 1]")
        if top_p < 1 and logprobs:
            raise EngineError("top_p changes the distribution: it needs logprobs=False")
        if not len(prompts) == len(limits) == len(places):
            raise EngineError(f"{len(prompts)} prompts, but {len(limits)} limits and {len(places)} places")
        for i, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
            if problem := self._misfit(prompt, limit, n):
                raise EngineError(f"prompt {i}: {problem}")

    def _misfit(self, prompt, limit: int, n: int) -> str:
        """Why this prompt could never be completed; "" where it can."""
        vocab, total = self.transformer.config.vocab_size, len(prompt) + limit
        if not len(prompt):
            return "empty"
        if min(prompt) < 0 or max(prompt) >= vocab:
            return f"ids {min(prompt)} to {max(prompt)} for a vocabulary of {vocab}"
        if limit < 1:
            return f"max_tokens={limit}: at least 1"
        if total > self.max_context:
            return f"{len(prompt)} tokens and max_tokens={limit} make {total}, over the context of {self.max_context}"
        need, usable = pages_for(total - 1) + (n > 1), max(0, self.pages - 1)
        return f"needs {need} pages of {self.page_bytes:,} bytes, the cache has {usable}" if need > usable else ""

    def _open(self, temperature: float, top_p: float) -> None:
        """Allocate what has not been, forget graphs of weights that have moved, and set the knobs."""
        model.refresh_lora(self.transformer)
        weights = [p.data_ptr() for p in self.transformer.parameters()]
        if weights != self.weights:
            self.graphs, self.weights = {}, weights
        if self.cache is None:
            self.cache = Cache(self.transformer, self.pages)
            self.state = State(self.max_rows, self.pages_a_row, self.look, self.eos_ids, self.device)
        self.state.knobs.temperature.fill_(temperature)
        self.state.knobs.top_p.fill_(top_p)

    def close(self) -> None:
        """Give the arena and the graphs back; the next call allocates and captures again."""
        self.calls += 1
        self.cache, self.state, self.graphs, self.step = None, None, {}, None
        if not self.cpu:
            torch.cuda.empty_cache()

    def prefill(self, prompts: list[tuple[list[int], list[int]]]) -> None:
        """Write keys and values of each (ids, pages) to the pages; about PREFILL_TOKENS at a time."""
        while prompts:
            fitting = max(1, bisect_right(list(accumulate(len(ids) for ids, _ in prompts)), PREFILL_TOKENS))
            self._prefill(prompts[:fitting])
            prompts = prompts[fitting:]

    def _prefill(self, batch: list[tuple[list[int], list[int]]]) -> None:
        """One packed row."""
        idle = -sum(len(ids) for ids, _ in batch) % self.tile
        batch = batch + [([0] * idle, [0])]  # fills the last tile, a document of its own in page 0
        lengths = [len(ids) for ids, _ in batch]
        cu_seqlens = torch.tensor(np.cumsum([0] + lengths), dtype=torch.int32, device=self.device)
        ids_T, slot_T = torch.from_numpy(np.concatenate([slots_of(*d) for d in batch], axis=1)).to(self.device)
        config, dtype = self.transformer.config, self.transformer.head_weight.dtype
        plan = kernels.attention_plan(cu_seqlens, len(ids_T), dtype, config.head_dim)

        def attend(layer, rotate):
            q_THD, k_TKD, v_TKD = rotate()
            self.cache.write(layer, slot_T, k_TKD, v_TKD)
            last = layer == config.num_hidden_layers - 1  # of which no row is asked for
            return q_THD if last else kernels.attention(q_THD, k_TKD, v_TKD, cu_seqlens, max(lengths), plan)

        self.transformer(ids_T, cu_seqlens, rows_N=ids_T[:0], attend=attend)

    def prepare(self, rows: int, mode: str) -> int:
        """Set self.step for `rows` rows, before they are written: a capture overwrites them. -> rows that it computes:
        whole tiles on a CPU, else 1, 2, 4, 8, 12, 16, 24, 32, 48..."""
        if self.cpu:
            rows = -(-rows // self.tile) * self.tile
        else:
            power = 1 << (rows - 1).bit_length()
            rows = min(self.max_rows, power * 3 // 4 if power > 8 and rows <= power * 3 // 4 else power)
        self.step = partial(decode_step, self.transformer, self.cache, self.state, rows, mode)
        if not self.cpu and kernels.backend(self.device) == "triton":  # the references look at lengths on the host
            if (rows, mode) not in self.graphs:
                self.graphs[rows, mode] = self._capture()
            self.step = self.graphs[rows, mode].replay
        return rows

    def advance(self, steps: int) -> None:
        self.state.step.zero_()
        for _ in range(steps):
            self.step()

    def _capture(self) -> torch.cuda.CUDAGraph:
        """self.step as a graph; no row is live meanwhile, so that nothing but page 0 and the window is written."""
        main, side = torch.cuda.current_stream(), torch.cuda.Stream()
        self.state.rows["live"].zero_()
        self.state.step.zero_()
        side.wait_stream(main)
        with torch.cuda.stream(side):  # once outside the graph, where kernels may be compiled
            self.step()
        main.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=next(iter(self.graphs.values())).pool() if self.graphs else None):
            self.step()
        return graph


# ------------------------------------------------------------------------------------------------- text
def completed(tokenizer, eos_ids, item: dict, sample: Sample, opened: bool) -> dict:
    """The item with `completion, tokens, finish_reason, thinking, answer` (None where the thinking never ended).

    opened: whether the chat template opens the thinking (safety.thinking_open). The item's `prefill` is the given
    start of the turn, with `prefill_thinking` that of the thinking; the completion is what comes after it.
    """
    text = safety.decode(tokenizer, sample.ids, eos_ids)
    opened = opened or item.get("prefill_thinking", False)
    thinking, answer = safety.split_thinking(item.get("prefill", "") + text, opened)
    made = {"completion": text, "tokens": len(sample.ids), "finish_reason": sample.finish_reason}
    return {**item, **made, "thinking": thinking, "answer": answer}


def prompt_ids(tokenizer, item: dict) -> list[int]:
    """Ids of the item's prompt as one user turn, and of the start of the answer or the thinking that it gives."""
    start = {"prefill": item.get("prefill", ""), "thinking": item.get("prefill_thinking", False)}
    return safety.render(tokenizer, [{"role": "user", "content": item["prompt"]}], **start)


def complete(
    transformer, tokenizer, items: list[dict], *, seed: int, max_tokens: int | list[int], temperature: float = 1.0,
    top_p: float = 1.0, samples: int = 1, places: list[int] | None = None, cache_bytes: int | None = None,
) -> Iterator[tuple[int, dict]]:  # fmt: skip
    """(index, completed item) as they end; sample k of item i has index i * samples + k, and `sample` k if samples > 1.

    max_tokens: of every completion, or one an item; less where the context ends before. A prompt that fills the whole
    context gets an empty completion of finish_reason "length". places, cache_bytes: see Engine; without
    places an item's draws depend on the seed and its id alone: they are the same in every selection of items.
    """
    if places is None:
        hashes = [hashlib.sha256(item["id"].encode()) for item in items]
        places = [int.from_bytes(h.digest()[:7], "big") for h in hashes]
    eos_ids, opened = model.end_ids(transformer, tokenizer), safety.thinking_open(tokenizer)
    context = transformer.config.max_position_embeddings
    prompts = [prompt_ids(tokenizer, item) for item in items]
    wishes = max_tokens if isinstance(max_tokens, list) else [max_tokens] * len(items)
    limits = [min(wish, context - len(ids)) for wish, ids in zip(wishes, prompts, strict=True)]
    numbered = [item if samples == 1 else {**item, "sample": k} for item in items for k in range(samples)]
    for index, item in enumerate(numbered):
        if len(prompts[index // samples]) >= context:
            yield index, completed(tokenizer, eos_ids, item, Sample([], None, "length"), opened)
    fitting = [i for i, ids in enumerate(prompts) if len(ids) < context]
    longest = max((len(prompts[i]) + limits[i] for i in fitting), default=1)
    for i, k, sample in Engine(transformer, eos_ids, max_context=longest, cache_bytes=cache_bytes).stream(
        [prompts[i] for i in fitting], samples, [limits[i] for i in fitting], temperature, seed,
        logprobs=False, top_p=top_p, places=[places[i] for i in fitting],
    ):  # fmt: skip
        index = fitting[i] * samples + k
        yield index, completed(tokenizer, eos_ids, numbered[index], sample, opened)
