// out = activation(x @ weight.T + bias) + residual on Hopper, by CUTLASS: TMA, warp-specialised and persistent, so that
// the epilogue of one tile runs beside the main loop of the next: at K = 768 an exact GELU is as long as the product.
#if defined(CLINFAST_CUTLASS)
#define CUTLASS_ENABLE_GDC_FOR_SM90
#include <cutlass/cutlass.h>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/epilogue/fusion/operations.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cutlass/gemm/kernel/gemm_universal.hpp>
#include <cutlass/util/packed_stride.hpp>
#endif

#include "cuda/gelu.cuh"
#include "cuda/launch.cuh"

namespace clinfast {
namespace cuda {

#if defined(CLINFAST_CUTLASS)
namespace {

using namespace cute;

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

enum class Epilogue { gelu, residual };

template <typename Element, Epilogue kind, typename Tile> struct Gemm {
  using Fusion = std::conditional_t<
      kind == Epilogue::gelu,
      cutlass::epilogue::fusion::LinCombPerColBiasEltAct<Gelu<Element>::template Of, Element, float, float, void,
                                                          float>,
      cutlass::epilogue::fusion::LinCombPerColBias<Element, float, float, Element, float>>;
  using Source = std::conditional_t<kind == Epilogue::gelu, void, Element>;
  using Cluster = Shape<_2, _1, _1>;
  static constexpr int kAlign = 8;
  using Row = cutlass::layout::RowMajor;
  using Column = cutlass::layout::ColumnMajor;
  using Finish = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster,
      cutlass::epilogue::collective::EpilogueTileAuto, float, float, Source, Row, kAlign, Element, Row, kAlign,
      cutlass::epilogue::TmaWarpSpecializedCooperative, Fusion>::CollectiveOp;
  using Main = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, Row, kAlign, Element, Column, kAlign, float, Tile,
      Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename Finish::SharedStorage))>,
      cutlass::gemm::KernelTmaWarpSpecializedCooperative>::CollectiveOp;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<Shape<int, int, int, int>, Main, Finish,
                                                     cutlass::gemm::PersistentScheduler>;
  using Device = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;
};

template <typename Element, Epilogue kind> int run(const LinearArgs &args, Stream stream) {
  using G = Gemm<Element, kind, Shape<_128, _128, _64>>;
  using Device = typename G::Device;
  const int m = int(args.rows), n = int(args.out_features), k = int(args.in_features);
  typename Device::Arguments arguments{cutlass::gemm::GemmUniversalMode::kGemm, {m, n, k, 1}};
  arguments.mainloop = {static_cast<const Element *>(args.x), {args.x_stride, {}, {}},
                        static_cast<const Element *>(args.weight), {args.weight_stride, {}, {}}};
  arguments.epilogue.ptr_C = static_cast<decltype(arguments.epilogue.ptr_C)>(args.residual);
  arguments.epilogue.dC = {args.residual_stride, {}, {}};
  arguments.epilogue.ptr_D = static_cast<Element *>(args.out);
  arguments.epilogue.dD = {args.out_stride, {}, {}};
  arguments.epilogue.thread.alpha = 1.0f;
  arguments.epilogue.thread.beta = args.residual ? 1.0f : 0.0f;
  arguments.epilogue.thread.bias_ptr = args.bias;
  arguments.hw_info.sm_count = args.multiprocessors;
  (void)Registration<&cutlass::device_kernel<typename G::Kernel>, sizeof(typename G::Kernel::SharedStorage)>::done;
  Device device;
  if (Device::get_workspace_size(arguments) > 0 || Device::can_implement(arguments) != cutlass::Status::kSuccess)
    return kNotServed;
  if (device.initialize(arguments, nullptr, static_cast<cudaStream_t>(stream)) != cutlass::Status::kSuccess)
    return kNotServed;
  return device.run(static_cast<cudaStream_t>(stream), nullptr, programmatic_launch()) == cutlass::Status::kSuccess
             ? 0
             : int(cudaGetLastError());
}

template <typename Element> int run(const LinearArgs &args, bool gelu, Stream stream) {
  return gelu ? run<Element, Epilogue::gelu>(args, stream) : run<Element, Epilogue::residual>(args, stream);
}

}  // namespace

bool has_cutlass() { return true; }

int linear_wgmma(const LinearArgs &args, bool gelu, DType dtype, Stream stream) {
  if (capability() != 90) return kNotServed;
  if (dtype == DType::bf16) return run<cutlass::bfloat16_t>(args, gelu, stream);
  return dtype == DType::f16 ? run<cutlass::half_t>(args, gelu, stream) : kNotServed;
}

#else

bool has_cutlass() { return has_linear_mma(); }

int linear_wgmma(const LinearArgs &, bool, DType, Stream) { return kNotServed; }

#endif

}  // namespace cuda
}  // namespace clinfast
