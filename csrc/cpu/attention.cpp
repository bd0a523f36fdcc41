// Attention over packed notes: exact softmax, one pass over blocks of keys with a running maximum (Milakov and
// Gimelshein 2018; FlashAttention, Dao et al. 2022). A work item is a range of one note's queries at one head. Keys are
// transposed block by block into scratch that stays in L2, six rows of scores live in L1, and the products run in
// register tiles. Blocks start at the note's first key, so a row's arithmetic is a function of its own note alone.
#include "attention_disentangled.h"
#include "attention_window.h"

namespace clinfast {
namespace CLINFAST_ISA {

// Most and fewest rows of a work item. They share the packing of its keys and values, 1% of the work at 400 rows.
static constexpr int64_t kMaxRows = 768, kMinRows = 48;
// Packing a key costs about as much as this many more rows.
static constexpr int64_t kPackRows = 8;
// Below this many multiply-adds (about 3 us), waking a team costs more than it gains.
static constexpr int64_t kSerialWork = 1 << 17;

struct Scratch {
  float *keys, *values, *queries, *scores, *weights, *out, *maximum, *sum, *line, *terms;
};

// Wide heads take half the keys and rows at a time, to stay within L2.
static int64_t halved(int64_t n, int64_t head_dim) { return head_dim <= kMaxHeadDim / 2 ? n : n / 2; }

static Scratch thread_scratch(int64_t head_dim) {
  Scratch s;
  const int64_t width = round_up(head_dim, Vec::N);
  const int64_t block_keys = halved(kBlockKeys, head_dim), max_rows = halved(kMaxRows, head_dim);
  carve<Scratch>({{&s.keys, head_dim * block_keys}, {&s.values, width * block_keys},
                  {&s.queries, kRows * kPanelStride}, {&s.scores, kRows * kPanelStride},
                  {&s.weights, kRows * kPanelStride}, {&s.out, max_rows * width},
                  {&s.maximum, max_rows},             {&s.sum, max_rows},
                  {&s.line, max_rows + block_keys + BiasTerms::kSpare}, {&s.terms, kRows * kPanelStride}});
  return s;
}

#if defined(CLINFAST_AMX)
static AmxScratch amx_scratch(int64_t head_dim) {
  AmxScratch s;
  const int64_t width = round_up(head_dim, 32), rows = round_up(halved(kMaxRows, head_dim), kAmxGroup) + kAmxGroup;
  carve<AmxScratch>({{&s.keys, width / 2 * kAmxKeys}, {&s.values, width * kAmxKeys / 2},
                     {&s.queries, rows * width / 2}, {&s.scores, kAmxGroup * kPanelStride},
                     {&s.weights, kAmxGroup * kPanelStride}, {&s.products, kAmxGroup * width},
                     {&s.out, rows * width}, {&s.maximum, rows}, {&s.sum, rows},
                     {&s.line, rows + kAmxKeys + BiasTerms::kSpare}, {&s.terms, kAmxGroup * kPanelStride}});
  return s;
}
#endif

// Into L2, ahead of their use: rows lie a token apart, which hardware prefetchers do not follow.
template <typename T, bool Write = false>
static inline void prefetch_rows(const T *row, int64_t stride, int64_t rows, int64_t size) {
  for (; rows > 0; rows--, row += stride)
    for (int64_t i = 0; i < size; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(row + i, Write, Write ? 3 : 2);
}

template <typename T, bool Pairs, typename Terms> struct Attention {
  const AttentionArgs &a;
  const Scratch s;
  const int64_t head_dim, depth, width;
  const float factor;
  const bool queries_in_place, values_in_place;
  Terms terms;
  static constexpr int kElements = Pairs ? 2 : 1;  // of a word

  explicit Attention(const AttentionArgs &args)
      : a(args), s(thread_scratch(args.head_dim)), head_dim(args.head_dim),
        depth(Pairs ? (head_dim + 1) / 2 : head_dim), width(round_up(head_dim, Vec::N)),
        factor(Terms::kScaled ? 1.0f : float(double(args.scale < 0 ? -args.scale : args.scale) * kLog2e)),
        queries_in_place(sizeof(T) * kElements == sizeof(float) && head_dim % kElements == 0 &&
                         a.q_token_stride % kElements == 0 && a.q_head_stride % kElements == 0 &&
                         reinterpret_cast<uintptr_t>(a.q) % sizeof(float) == 0),
        values_in_place(sizeof(T) == sizeof(float) && width == head_dim), terms(args, s.line, s.terms, kPanelStride) {}

  int64_t block_keys() const { return halved(kBlockKeys, head_dim); }

  // M rows of the item from `row` on, against its keys [key, key + keys).
  template <int M> void panel(const Item<T> &item, int64_t row, int64_t key, int64_t keys) {
    const bool first = key == 0, last = key + keys == item.keys;
    const T *v = item.v + key * a.v_token_stride;
    const T *q = item.q + row * a.q_token_stride;
    T *out = item.out + row * a.out_token_stride;
    const float *queries = queries_in_place ? reinterpret_cast<const float *>(q) : s.queries;
    const int64_t query_stride = queries_in_place ? a.q_token_stride / kElements : kPanelStride;
    if (!queries_in_place) pack_queries<Pairs>(q, a.q_token_stride, M, head_dim, s.queries);
    prefetch_rows(q + M * a.q_token_stride, a.q_token_stride, smaller(item.rows - row - M, kRows), head_dim);
    if (last) prefetch_rows<T, true>(out, a.out_token_stride, M, head_dim);

    const auto added = terms.of_panel(row, M, key, keys);
    const bool negate = !Terms::kScaled && a.scale < 0;
    Vec row_max[M];
    for (int i = 0; i < M; i++) row_max[i] = Vec::set(-__builtin_inff());
    for (int64_t j = 0; j < keys; j += kTileKeys) {
      const int64_t tile_keys = smaller(keys - j, kTileKeys);
      float *tile = s.keys + j * depth;
      if (row == 0) {
        const T *k = item.k + (key + j) * a.k_token_stride;
        pack_keys<Pairs>(k, a.k_token_stride, tile_keys, head_dim, tile);
        prefetch_rows(v + j * a.v_token_stride, a.v_token_stride, tile_keys, head_dim);
        prefetch_rows(k + kTileKeys * a.k_token_stride, a.k_token_stride, smaller(keys - j - kTileKeys, kTileKeys),
                      head_dim);
      }
      score_tile<Pairs, M>(queries, query_stride, tile, depth, negate, tile_keys, s.scores + j, row_max, added, j);
    }

    if (row == 0 && !values_in_place) pack_values<Pairs>(v, a.v_token_stride, keys, head_dim, width, s.values);
    weigh_and_multiply<M>(item, row, v, 0, keys, keys, first, last, row_max);
  }

  // From the scores of M rows with the keys [begin, end) of a block, whose values start at `v`, to their part of the result;
  // up to `padded` the scores are to be weighed too. `begin` is a multiple of Vec::N.
  template <int M>
  void weigh_and_multiply(const Item<T> &item, int64_t row, const T *v, int64_t begin, int64_t end, int64_t padded, bool first,
                          bool last, const Vec *row_max) {
    T *out = item.out + row * a.out_token_stride;
    float maximum[M], before[M], sum[M], rescale[M], scale[M];
    float *weights = Pairs ? s.weights : s.scores;
#pragma GCC unroll 8
    for (int i = 0; i < M; i++) maximum[i] = row_max[i].max();
    if (!first)
      for (int i = 0; i < M; i++) {
        before[i] = s.maximum[row + i];
        if (before[i] > maximum[i]) maximum[i] = before[i];
      }
    float subtracted[M];
    for (int i = 0; i < M; i++) subtracted[i] = a.window < 0 ? maximum[i] : top_of_seen(maximum[i]);
    weigh_rows<Pairs, M>(s.scores + begin, weights + begin / kElements, padded - begin, factor, subtracted, sum);
    if (!first)
      for (int i = 0; i < M; i++) {
        rescale[i] = exp2_nonpositive<Pairs>(Vec::set((before[i] - maximum[i]) * factor)).max();
        sum[i] += s.sum[row + i] * rescale[i];
      }
    if (!last)
      for (int i = 0; i < M; i++) {
        s.maximum[row + i] = maximum[i];
        s.sum[row + i] = sum[i];
      }
    for (int i = 0; i < M; i++) scale[i] = 1.0f / sum[i];

    const float *values = values_in_place ? reinterpret_cast<const float *>(v) : s.values;
    const int64_t value_stride = values_in_place ? a.v_token_stride : width;
    const int64_t first_step = begin / kElements, steps = Pairs ? (end + 1) / 2 : end;
    const int64_t vecs = width / Vec::N, chunks = (vecs + kTileVecs - 1) / kTileVecs;
    for (int64_t step = first_step, count; step < steps; step += count) {
      count = smaller(steps - step, kValueChain - step % kValueChain);
      const bool resumed = !first || step > first_step, done = last && step + count == steps;
      for (int64_t chunk = 0; chunk < chunks; chunk++) {
        const int64_t left = vecs * chunk / chunks, right = vecs * (chunk + 1) / chunks;
        with_constant<kTileVecs>(right - left, [&](auto n) {
          multiply_tile<Pairs, M, decltype(n)::value>(
              weights + step, kPanelStride, values + step * value_stride + left * Vec::N, value_stride, count,
              [&](int i, int j, Vec c) {
                const int64_t column = (left + j) * Vec::N;
                float *partial = s.out + (row + i) * width + column;
                if (resumed) c = fma(Vec::load(partial), Vec::set(rescale[i]), c);
                if (!done) return c.store(partial);
                const int64_t lanes = smaller(head_dim - column, Vec::N);
                store(c * Vec::set(scale[i]), out + i * a.out_token_stride + column, int(lanes));
              });
        });
      }
      for (int i = 0; i < M; i++) rescale[i] = 1.0f;
    }
  }

  void run(const Item<T> &item) {
    if (item.keys == 0) {
      for (int64_t row = 0; row < item.rows; row++)
        memset(item.out + row * a.out_token_stride, 0, size_t(head_dim) * sizeof(T));
      return;
    }
    terms.begin_item(item);
    for (int64_t key = 0; key < item.keys; key += block_keys()) {
      const int64_t keys = smaller(item.keys - key, block_keys());
      terms.begin_block(key, keys);
      for (int64_t row = 0; row < item.rows; row += kRows)
        with_constant<kRows>(smaller(item.rows - row, kRows),
                             [&](auto m) { panel<decltype(m)::value>(item, row, key, keys); });
    }
  }
};

#if defined(CLINFAST_AMX)
// Which of the two computes a note depends on its own queries only, as its bits must.
template <typename Amx, typename Vector> struct AmxOrVector {
  Amx amx;
  Vector vector;

  explicit AmxOrVector(const AttentionArgs &args) : amx(args, amx_scratch(args.head_dim)), vector(args) {}

  void run(const Item<bf16_t> &item) {
    if (item.note_rows < kAmxFewestQueries || item.keys == 0) vector.run(item);
    else amx.run(item);
  }
};
#endif

// The work items in an order that every thread can walk by itself: costly ones first, then by note, rows and head.
struct Schedule {
  const AttentionArgs &a;
  const int64_t panel_rows;
  int64_t total = 0, share = 0;
  int threads = 1;

  int64_t rows(int64_t note) const { return a.cu_seqlens_q[note + 1] - a.cu_seqlens_q[note]; }
  int64_t keys(int64_t note) const {
    int64_t n = a.cu_seqlens_k[note + 1] - a.cu_seqlens_k[note];
    if (a.seqused_k && a.seqused_k[note] < n) n = a.seqused_k[note] < 0 ? 0 : a.seqused_k[note];
    return n;
  }

  // Keys that a row of the note meets, about.
  int64_t met(int64_t note) const {
    const int64_t all = keys(note);
    return a.window < 0 ? all : smaller(all, 2 * a.window + panel_rows);
  }

  Schedule(const AttentionArgs &args, int64_t rows_of_a_panel) : a(args), panel_rows(rows_of_a_panel) {
    for (int64_t note = 0; note < a.batch; note++)
      if (rows(note)) total += rows(note) * met(note) + kPackRows * keys(note);
    if (total * a.num_heads * a.head_dim >= kSerialWork) threads = a.num_threads < 1 ? 1 : a.num_threads;
    share = total * a.num_heads / (threads * 6) + 1;
  }

  int64_t rows_per_item(int64_t note) const {
    const int64_t n = rows(note);
    const int64_t max_rows = halved(kMaxRows, a.head_dim);
    int64_t parts = (n + max_rows - 1) / max_rows;
    if (threads > 1) {
      const int64_t wanted = n * met(note) / share + 1, most = n / kMinRows;
      if (parts < wanted) parts = wanted < most ? wanted : (most > parts ? most : parts);
    }
    return round_up((n + parts - 1) / parts, panel_rows);
  }
};

static int64_t take(int64_t &next) {
  int64_t ticket;
#pragma omp atomic capture
  ticket = next++;
  return ticket;
}

template <typename T, typename Kernel> static void work(const Schedule &plan, int64_t &next) {
  const AttentionArgs &a = plan.a;
  Kernel attention(a);
  int64_t ticket = take(next), begin = 0;
  for (int pass = 0; pass < 2; pass++)
    for (int64_t note = 0; note < a.batch; note++) {
      const int64_t rows = plan.rows(note), keys = plan.keys(note);
      if (rows == 0) continue;
      const int64_t step = plan.rows_per_item(note);
      if ((step * plan.met(note) > plan.share / 4) != (pass == 0)) continue;
      const int64_t end = begin + (rows + step - 1) / step * a.num_heads;
      for (; ticket < end; ticket = take(next)) {
        const int64_t head = (ticket - begin) % a.num_heads, row = (ticket - begin) / a.num_heads * step;
        const int64_t q = a.cu_seqlens_q[note] + row, k = a.cu_seqlens_k[note];
        attention.run({static_cast<const T *>(a.q) + q * a.q_token_stride + head * a.q_head_stride,
                       static_cast<const T *>(a.k) + k * a.k_token_stride + head * a.k_head_stride,
                       static_cast<const T *>(a.v) + k * a.v_token_stride + head * a.v_head_stride,
                       static_cast<T *>(a.out) + q * a.out_token_stride + head * a.out_head_stride,
                       smaller(rows - row, step), keys, rows, head, row, a.q_places ? a.q_places + q : nullptr,
                       a.k_places ? a.k_places + k : nullptr});
      }
      begin = end;
    }
}

template <typename T, typename Kernel> static void attend(const AttentionArgs &a, int64_t panel_rows) {
  const Schedule plan(a, panel_rows);
  int64_t next = 0;
#pragma omp parallel num_threads(plan.threads) if (plan.threads > 1)
  work<T, Kernel>(plan, next);
}

#if defined(CLINFAST_AVX512_BF16)
static constexpr bool kPairs = true;
#else
static constexpr bool kPairs = false;
#endif

// Terms for fp32 and for bf16.
template <typename Full, typename Half> static void attend_with(const AttentionArgs &a) {
  if (a.dtype == DType::f32) return attend<float, Attention<float, false, Full>>(a, kRows);
#if defined(CLINFAST_AMX)
  attend<bf16_t, AmxOrVector<AmxAttention<Half>, Attention<bf16_t, true, Half>>>(a, kAmxGroup);
#else
  attend<bf16_t, Attention<bf16_t, kPairs, Half>>(a, kRows);
#endif
}

template <typename T, bool Pairs> using Windowed = WindowedVector<T, Pairs, Attention<T, Pairs, WindowTerms>>;

static void attend_in_window(const AttentionArgs &a) {
  if (a.dtype == DType::f32) return attend<float, Windowed<float, false>>(a, kRows);
#if defined(CLINFAST_AMX)
  attend<bf16_t, AmxOrVector<WindowedAmx<AmxAttention<WindowTerms>>, Windowed<bf16_t, true>>>(a, kAmxGroup);
#else
  attend<bf16_t, Windowed<bf16_t, kPairs>>(a, kRows);
#endif
}

void attention(const AttentionArgs &a) {
  if (a.window >= 0) attend_in_window(a);
  else if (a.buckets) attend_with<DisentangledTerms<float, false>, DisentangledTerms<bf16_t, kPairs>>(a);
  else if (a.bias) attend_with<BiasTerms, BiasTerms>(a);
  else attend_with<NoTerms, NoTerms>(a);
}

}  // namespace CLINFAST_ISA
}  // namespace clinfast
