// out = gelu(x @ weight.T + bias) on compute capability 8.0 to 8.9, by CUTLASS: mma.sync with cp.async, the exact GELU
// in the epilogue, where the library of the card would leave it to a second pass over memory. The bias is the product's
// source matrix, with rows that lie on one another.
#if defined(CLINFAST_CUTLASS)
#include <cutlass/cutlass.h>
#include <cutlass/epilogue/thread/linear_combination_generic.h>
#include <cutlass/gemm/device/gemm.h>
#endif

#include "cuda/gelu.cuh"
#include "cuda/launch.cuh"

namespace clinfast {
namespace cuda {

#if defined(CLINFAST_CUTLASS)
namespace {

template <typename Element> struct OurType;
template <> struct OurType<cutlass::bfloat16_t> { using Type = bfloat16; };
template <> struct OurType<cutlass::half_t> { using Type = float16; };

// Our exact GELU, to within the rounding of Element, as an activation of CUTLASS.
template <typename Element> struct Gelu {
  template <typename T> struct Of {
    static const bool kIsHeavy = true;
    CUTLASS_DEVICE T operator()(T const &x) const {
      if constexpr (std::is_same_v<T, float>) {
        return gelu_erf<typename OurType<Element>::Type>(x);
      } else {
        T y;
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < T::kElements; i++) y[i] = gelu_erf<typename OurType<Element>::Type>(x[i]);
        return y;
      }
    }
  };
};

template <typename Element, typename Tile, typename WarpTile, int Stages>
int run(const LinearArgs &args, Stream stream) {
  using namespace cutlass;
  using Epilogue = epilogue::thread::LinearCombinationGeneric<Gelu<Element>::template Of, Element, 8, float, float,
                                                              epilogue::thread::ScaleType::NoBetaScaling>;
  using Row = layout::RowMajor;
  using Device = gemm::device::Gemm<Element, Row, Element, layout::ColumnMajor, Element, Row, float,
                                    arch::OpClassTensorOp, arch::Sm80, Tile, WarpTile, gemm::GemmShape<16, 8, 16>,
                                    Epilogue, gemm::threadblock::GemmIdentityThreadblockSwizzle<8>, Stages, 8, 8>;
  using Kernel = typename Device::GemmKernel;
  (void)Registration<&cutlass::Kernel<Kernel>, sizeof(typename Kernel::SharedStorage)>::done;
  const Element *bias = static_cast<const Element *>(args.bias16);
  typename Device::Arguments arguments{
      {int(args.rows), int(args.out_features), int(args.in_features)},
      {static_cast<const Element *>(args.x), args.x_stride},
      {static_cast<const Element *>(args.weight), args.weight_stride},
      {bias, 0},
      {static_cast<Element *>(args.out), args.out_stride},
      {1.0f, bias ? 1.0f : 0.0f}};
  if (Device::can_implement(arguments) != Status::kSuccess) return kNotServed;
  Device device;
  return device(arguments, nullptr, static_cast<cudaStream_t>(stream)) == Status::kSuccess ? 0 : int(cudaGetLastError());
}

template <typename Element> int run(const LinearArgs &args, Stream stream) {
  using cutlass::gemm::GemmShape;
  const int64_t tiles = (args.rows + 127) / 128 * ((args.out_features + 127) / 128);
  // Fewer tiles than multiprocessors leave some idle: smaller ones then.
  if (tiles < args.multiprocessors) return run<Element, GemmShape<64, 64, 64>, GemmShape<32, 32, 64>, 4>(args, stream);
  return run<Element, GemmShape<128, 128, 32>, GemmShape<64, 64, 32>, 4>(args, stream);
}

}  // namespace

bool has_linear_mma() { return true; }

int linear_mma(const LinearArgs &args, DType dtype, Stream stream) {
  const int cc = capability();
  if (cc < 80 || cc >= 90 || !args.bias16) return kNotServed;
  if (dtype == DType::bf16) return run<cutlass::bfloat16_t>(args, stream);
  return dtype == DType::f16 ? run<cutlass::half_t>(args, stream) : kNotServed;
}

#else

bool has_linear_mma() { return false; }

int linear_mma(const LinearArgs &, DType, Stream) { return kNotServed; }

#endif

}  // namespace cuda
}  // namespace clinfast
