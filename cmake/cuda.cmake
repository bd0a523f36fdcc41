# The CUDA kernels. CLINFAST_CUDA (variable or environment): ON builds them, for every architecture unless
# CMAKE_CUDA_ARCHITECTURES says otherwise; OFF leaves them out; AUTO, the default, builds them for this machine's cards
# where there are nvcc and an NVIDIA driver.
if(NOT DEFINED CLINFAST_CUDA)
  set(CLINFAST_CUDA "$ENV{CLINFAST_CUDA}")
endif()
if(CLINFAST_CUDA STREQUAL "")
  set(CLINFAST_CUDA AUTO)
endif()

if(CLINFAST_CUDA MATCHES "^(0|OFF|off|no)$")
  message(STATUS "CUDA kernels: left out, as CLINFAST_CUDA says")
  return()
endif()

include(CheckLanguage)
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  if(NOT CLINFAST_CUDA STREQUAL "AUTO")
    message(FATAL_ERROR "CLINFAST_CUDA=${CLINFAST_CUDA}, but there is no nvcc on PATH or in CUDACXX")
  endif()
  message(STATUS "CUDA kernels: left out, there is no nvcc")
  return()
endif()

if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
  if(CLINFAST_CUDA STREQUAL "AUTO")
    execute_process(
      COMMAND nvidia-smi --query-gpu=compute_cap --format=csv,noheader
      OUTPUT_VARIABLE capabilities ERROR_QUIET RESULT_VARIABLE status)
    string(REGEX MATCHALL "[0-9]+\\.[0-9]+" capabilities "${capabilities}")
    if(NOT status EQUAL 0 OR NOT capabilities)
      message(STATUS "CUDA kernels: left out, nvcc is here but no NVIDIA GPU; CLINFAST_CUDA=1 builds them all the same")
      return()
    endif()
    list(REMOVE_DUPLICATES capabilities)
    string(REPLACE "." "" capabilities "${capabilities}")
    set(CMAKE_CUDA_ARCHITECTURES "")
    foreach(capability IN LISTS capabilities)
      string(REGEX REPLACE "^90$" "90a" capability "${capability}")
      list(APPEND CMAKE_CUDA_ARCHITECTURES ${capability}-real)
    endforeach()
  else()
    # PTX of 100 serves what comes after the listed cards, and 110.
    set(CMAKE_CUDA_ARCHITECTURES 75-real 80-real 86-real 89-real 90a-real 100-real 100-virtual 120-real)
  endif()
endif()
message(STATUS "CUDA kernels: for ${CMAKE_CUDA_ARCHITECTURES}")

enable_language(CUDA)

file(GLOB CUDA_KERNELS CONFIGURE_DEPENDS csrc/cuda/*.cu)
target_sources(_C PRIVATE ${CUDA_KERNELS} csrc/cuda_bindings.cpp)
target_compile_definitions(_C PRIVATE CLINFAST_CUDA)
# The runtime is static, so that the module loads on a machine without a driver.
set_target_properties(_C PROPERTIES
  CUDA_ARCHITECTURES "${CMAKE_CUDA_ARCHITECTURES}"
  CUDA_STANDARD 17
  CUDA_STANDARD_REQUIRED ON
  CUDA_VISIBILITY_PRESET hidden
  CUDA_RUNTIME_LIBRARY Static)
target_compile_options(_C PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:-DNDEBUG>)
# A fifth of the default's size; drivers of CUDA 13 unpack it.
if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 13.0)
  target_compile_options(_C PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:--compress-mode=size>)
endif()

# The products of our own need CUTLASS's headers: CLINFAST_CUTLASS (variable or environment) names the folder that holds
# include/, or they come from the Python package nvidia-cutlass.
if(NOT CLINFAST_CUTLASS)
  set(CLINFAST_CUTLASS "$ENV{CLINFAST_CUTLASS}")
endif()
if(NOT CLINFAST_CUTLASS)
  execute_process(
    COMMAND ${Python_EXECUTABLE} -c
      "import importlib.util as u; print(u.find_spec('cutlass_library').submodule_search_locations[0] + '/source')"
    OUTPUT_VARIABLE CLINFAST_CUTLASS OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
endif()
set(CUTLASS_ARCHITECTURES "${CMAKE_CUDA_ARCHITECTURES}")
list(FILTER CUTLASS_ARCHITECTURES INCLUDE REGEX "^(80|86|89|90a)(-real)?$")
if(NOT CUTLASS_ARCHITECTURES)
  message(STATUS "CUDA kernels: no product of our own, which is for 8.0 to 9.0")
elseif(EXISTS "${CLINFAST_CUTLASS}/include/cutlass/cutlass.h")
  message(STATUS "CUDA kernels: with products of our own, on CUTLASS in ${CLINFAST_CUTLASS}")
  # Libraries of their own: CUTLASS takes half a minute an architecture, and each is for its own ones.
  function(add_product name architectures)
    set(chosen "${CMAKE_CUDA_ARCHITECTURES}")
    list(FILTER chosen INCLUDE REGEX "^(${architectures})(-real)?$")
    if(NOT chosen)
      return()
    endif()
    get_target_property(sources _C SOURCES)
    list(FILTER sources EXCLUDE REGEX "${name}")
    set_target_properties(_C PROPERTIES SOURCES "${sources}")
    add_library(${name} OBJECT csrc/cuda/${name}.cu)
    set_target_properties(${name} PROPERTIES
      CUDA_ARCHITECTURES "${chosen}" CUDA_STANDARD 17 CUDA_VISIBILITY_PRESET hidden POSITION_INDEPENDENT_CODE ON)
    target_compile_definitions(${name} PRIVATE CLINFAST_CUTLASS NDEBUG)
    target_compile_options(${name} PRIVATE --expt-relaxed-constexpr)
    target_include_directories(${name} PRIVATE
      csrc "${CLINFAST_CUTLASS}/include" "${CLINFAST_CUTLASS}/tools/util/include")
    target_sources(_C PRIVATE $<TARGET_OBJECTS:${name}>)
  endfunction()
  add_product(linear_wgmma "90a")
  add_product(linear_mma "80|86|89")
else()
  message(STATUS "CUDA kernels: without products of our own, there is no CUTLASS (pip install nvidia-cutlass)")
endif()
