// The CUDA kernels behind plain integers: addresses, strides in elements, sizes, then device and stream. A kernel that
// cannot be launched raises RuntimeError with its name.
#include "cuda_bindings.h"

#include <stdexcept>
#include <string>

#include "cuda/kernels.h"

namespace py = pybind11;

namespace clinfast {
namespace {

using namespace cuda;

template <typename T> T *pointer(uintptr_t address) { return reinterpret_cast<T *>(address); }

void check(const char *kernel, int code) {
  if (code)
    throw std::runtime_error(std::string(kernel) + ": the CUDA kernel was not launched: " + error_text(code) +
                             " (error " + std::to_string(code) + ")");
}

// Launches with the GIL released, on `device`, and makes the caller's device current again.
template <typename Launch> void on_device(const char *kernel, int device, Launch launch) {
  int code;
  {
    py::gil_scoped_release release;
    int before = device;
    code = exchange_device(device, before);
    if (!code) code = launch();
    if (before != device) exchange_device(before, device);
  }
  check(kernel, code);
}

void layer_norm_at(uintptr_t x, uintptr_t residual, uintptr_t bias, uintptr_t weight, uintptr_t shift, uintptr_t out,
                   int64_t x_stride, int64_t residual_stride, int64_t out_stride, int64_t rows, int32_t hidden,
                   float eps, int dtype, int device, uintptr_t stream) {
  const LayerNormArgs args{pointer<void>(x), pointer<void>(residual), pointer<float>(bias), pointer<float>(weight),
                           pointer<float>(shift), pointer<void>(out), x_stride, residual_stride, out_stride, rows,
                           hidden, eps};
  on_device("layer_norm", device, [&] { return layer_norm(args, DType(dtype), pointer<void>(stream)); });
}

void embedding_at(uintptr_t input_ids, uintptr_t token_type_ids, int64_t ids_row_stride, int64_t ids_column_stride,
                  int64_t types_row_stride, int64_t types_column_stride, int ids_itemsize, int types_itemsize,
                  uintptr_t indices, uintptr_t position_ids, int64_t batch, int64_t seqlen, int64_t tokens,
                  int32_t hidden, int64_t position_offset, uintptr_t word, uintptr_t position, uintptr_t token_type,
                  int64_t word_stride, int64_t position_stride, int64_t token_type_stride, int64_t vocab_size,
                  int64_t max_positions, int64_t type_vocab_size, uintptr_t weight, uintptr_t shift, uintptr_t out,
                  int64_t out_stride, float eps, int table_dtype, int out_dtype, int device, uintptr_t stream) {
  const EmbeddingArgs args{pointer<void>(input_ids), pointer<void>(token_type_ids), ids_row_stride, ids_column_stride,
                           types_row_stride, types_column_stride, pointer<int32_t>(indices),
                           pointer<int32_t>(position_ids), pointer<void>(word), pointer<void>(position),
                           pointer<void>(token_type), word_stride, position_stride, token_type_stride,
                           pointer<float>(weight), pointer<float>(shift), pointer<void>(out), out_stride, tokens,
                           batch, seqlen, vocab_size, max_positions, type_vocab_size, position_offset, ids_itemsize,
                           types_itemsize, hidden, eps, DType(out_dtype)};
  on_device("embedding", device, [&] { return embedding(args, DType(table_dtype), pointer<void>(stream)); });
}

void gelu_at(uintptr_t x, uintptr_t bias, uintptr_t out, int64_t x_stride, int64_t out_stride, int64_t rows,
             int64_t hidden, int kind, int dtype, int device, uintptr_t stream) {
  const GeluArgs args{pointer<void>(x), pointer<float>(bias), pointer<void>(out), x_stride, out_stride, rows, hidden};
  on_device("gelu", device, [&] { return gelu(args, GeluKind(kind), DType(dtype), pointer<void>(stream)); });
}

void pooling_at(uintptr_t x, uintptr_t out, uintptr_t cu_seqlens, int64_t x_stride, int64_t out_stride, int64_t batch,
                int64_t rows, int64_t hidden, int kind, int dtype, int device, uintptr_t stream) {
  const PoolingArgs args{pointer<void>(x), pointer<void>(out), pointer<int32_t>(cu_seqlens), x_stride, out_stride,
                         batch, rows, hidden};
  on_device("pooling", device, [&] { return pooling(args, PoolingKind(kind), DType(dtype), pointer<void>(stream)); });
}

void pack_at(uintptr_t mask, uintptr_t input_ids, uintptr_t token_type_ids, int64_t mask_row_stride,
             int64_t mask_column_stride, int64_t ids_row_stride, int64_t ids_column_stride, int64_t types_row_stride,
             int64_t types_column_stride, int mask_itemsize, int ids_itemsize, int types_itemsize, int64_t batch,
             int64_t seqlen, int64_t vocab_size, int64_t type_vocab_size, bool keep_padding, uintptr_t cu_seqlens,
             uintptr_t indices, uintptr_t seqused_k, uintptr_t notes, uintptr_t facts, int device, uintptr_t stream) {
  const PackArgs args{pointer<void>(mask), pointer<void>(input_ids), pointer<void>(token_type_ids), mask_row_stride,
                      mask_column_stride, ids_row_stride, ids_column_stride, types_row_stride, types_column_stride,
                      batch, seqlen, vocab_size, type_vocab_size, mask_itemsize, ids_itemsize, types_itemsize,
                      keep_padding, pointer<int32_t>(cu_seqlens), pointer<int32_t>(indices),
                      pointer<int32_t>(seqused_k), pointer<int32_t>(notes), pointer<int64_t>(facts)};
  on_device("pack", device, [&] { return pack(args, pointer<void>(stream)); });
}

void pack_into_at(uintptr_t mask, uintptr_t input_ids, uintptr_t token_type_ids, int64_t mask_row_stride,
                  int64_t mask_column_stride, int64_t ids_row_stride, int64_t ids_column_stride,
                  int64_t types_row_stride, int64_t types_column_stride, int mask_itemsize, int ids_itemsize,
                  int types_itemsize, int64_t batch, int64_t seqlen, int64_t vocab_size, int64_t type_vocab_size,
                  bool keep_padding, uintptr_t cu_seqlens, uintptr_t indices, uintptr_t seqused_k, uintptr_t notes_room,
                  uintptr_t facts, uintptr_t out_ids, uintptr_t out_types, uintptr_t out_positions, int64_t rows,
                  int64_t notes, int64_t position_offset, int64_t padding_idx, bool counts_positions, int device,
                  uintptr_t stream) {
  const PackIntoArgs args{
      {pointer<void>(mask), pointer<void>(input_ids), pointer<void>(token_type_ids), mask_row_stride,
       mask_column_stride, ids_row_stride, ids_column_stride, types_row_stride, types_column_stride, batch, seqlen,
       vocab_size, type_vocab_size, mask_itemsize, ids_itemsize, types_itemsize, keep_padding,
       pointer<int32_t>(cu_seqlens), pointer<int32_t>(indices), pointer<int32_t>(seqused_k),
       pointer<int32_t>(notes_room), pointer<int64_t>(facts)},
      pointer<int32_t>(out_ids), pointer<int32_t>(out_types), pointer<int32_t>(out_positions), rows, notes,
      position_offset, padding_idx, counts_positions};
  on_device("pack_into", device, [&] { return pack_into(args, pointer<void>(stream)); });
}

void unpack_at(uintptr_t packed, uintptr_t padded, uintptr_t indices, int64_t packed_stride, int64_t tokens,
               int64_t positions, int64_t hidden, int packed_dtype, int padded_dtype, int device, uintptr_t stream) {
  const UnpackArgs args{pointer<void>(packed), pointer<void>(padded), pointer<int32_t>(indices), packed_stride,
                        tokens, positions, hidden};
  on_device("unpack", device,
            [&] { return unpack(args, DType(packed_dtype), DType(padded_dtype), pointer<void>(stream)); });
}

void position_ids_at(uintptr_t input_ids, int64_t row_stride, int64_t column_stride, int itemsize, int64_t batch,
                     int64_t seqlen, int64_t padding_idx, uintptr_t out, int device, uintptr_t stream) {
  const PositionArgs args{pointer<void>(input_ids), row_stride, column_stride, batch, seqlen, padding_idx, itemsize,
                          pointer<int32_t>(out)};
  on_device("position_ids", device, [&] { return position_ids(args, pointer<void>(stream)); });
}

void attention_at(uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t out, int64_t q_token_stride, int64_t q_head_stride,
                  int64_t k_token_stride, int64_t k_head_stride, int64_t v_token_stride, int64_t v_head_stride,
                  int64_t out_token_stride, int64_t out_head_stride, uintptr_t cu_seqlens_q, uintptr_t cu_seqlens_k,
                  uintptr_t seqused_k, int32_t batch, int32_t num_heads, int32_t head_dim, int32_t q_tokens,
                  int32_t k_tokens, float scale, uintptr_t partial, int32_t segments, int dtype, int kernel, int device,
                  uintptr_t stream) {
  const AttentionArgs args{pointer<void>(q), pointer<void>(k), pointer<void>(v), pointer<void>(out), q_token_stride,
                           q_head_stride, k_token_stride, k_head_stride, v_token_stride, v_head_stride,
                           out_token_stride, out_head_stride, pointer<int32_t>(cu_seqlens_q),
                           pointer<int32_t>(cu_seqlens_k), pointer<int32_t>(seqused_k), batch, num_heads, head_dim,
                           q_tokens, k_tokens, scale, pointer<float>(partial), segments, 0};
  on_device("attention", device,
            [&] { return attention(args, DType(dtype), AttentionKernel(kernel), pointer<void>(stream)); });
}

// False where there is no such kernel for these sizes, this card, or this build.
bool linear_at(uintptr_t x, uintptr_t weight, uintptr_t bias, uintptr_t residual, uintptr_t bias16, uintptr_t out,
               int64_t x_stride, int64_t weight_stride, int64_t residual_stride, int64_t out_stride, int64_t rows, int64_t in_features,
               int64_t out_features, bool gelu, int dtype, int32_t multiprocessors, int device, uintptr_t stream) {
  const LinearArgs args{pointer<void>(x), pointer<void>(weight), pointer<float>(bias), pointer<void>(residual),
                        pointer<void>(bias16), pointer<void>(out), x_stride, weight_stride, residual_stride, out_stride, rows, in_features,
                        out_features, multiprocessors};
  bool served = true;
  on_device("linear", device, [&] {
    int code = linear_wgmma(args, gelu, DType(dtype), pointer<void>(stream));
    if (code == kNotServed && gelu && !residual) code = linear_mma(args, DType(dtype), pointer<void>(stream));
    served = code != kNotServed;
    return served ? code : 0;
  });
  return served;
}

py::dict found_versions() {
  const Versions found = versions();
  py::dict result;
  result["driver"] = found.driver;
  result["runtime"] = found.runtime;
  result["devices"] = found.devices;
  result["error"] = found.error;
  result["text"] = error_text(found.error);
  return result;
}

}  // namespace

void add_cuda(py::module_ m) {
  m.doc() = "The CUDA kernels. Addresses are integers, strides count elements; nothing is checked here: call them "
            "through clinfast.ops.";
  m.def("versions", &found_versions, "CUDA versions of the driver and of this build, and the devices there are.");
  m.def(
      "prepare",
      [](int device) { on_device("prepare", device, [] { return prepare(); }); },
      "Load every kernel on a device, so that a graph capture loads none.");
  m.def("set_programmatic_launch", &set_programmatic_launch,
        "Whether kernels are set up while the one before them ends, on cards of 9.0 and later.");
  m.def("layer_norm", &layer_norm_at);
  m.def("embedding", &embedding_at);
  m.def("gelu", &gelu_at);
  m.def("pooling", &pooling_at);
  m.def("pack", &pack_at);
  m.def("pack_into", &pack_into_at);
  m.def("pack_into_counts_first", &pack_into_counts_first, "Whether that many positions need room for counts.");
  m.def("unpack", &unpack_at);
  m.def("position_ids", &position_ids_at);
  m.def("attention", &attention_at);
  m.def("attention_segments", &attention_segments, "Parts of a note's keys that the kernel for few queries may make.");
  m.def("linear", &linear_at);
  m.def("has_cutlass", &has_cutlass, "Whether this build has a product of our own, by CUTLASS.");
}

}  // namespace clinfast
