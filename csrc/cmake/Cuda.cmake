# Sets INDEXCACHE_WITH_CUDA, INDEXCACHE_CUDA_ARCHS_USED, INDEXCACHE_CUDA_LIBRARIES; defines indexcache_cuda_objects().
set(INDEXCACHE_WITH_CUDA OFF)
set(INDEXCACHE_CUDA_ARCHS_USED "")
set(INDEXCACHE_CUDA_LIBRARIES "")

if(NOT INDEXCACHE_CUDA STREQUAL "OFF")
  include(CheckLanguage)
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    set(CMAKE_CUDA_ARCHITECTURES OFF)  # each target names its own
    enable_language(CUDA)
    find_package(CUDAToolkit REQUIRED)
    set(INDEXCACHE_WITH_CUDA ON)
    set(CMAKE_CUDA_STANDARD 20)
    set(CMAKE_CUDA_STANDARD_REQUIRED ON)
    set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
    set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
    set(INDEXCACHE_CUDA_LIBRARIES CUDA::cudart_static)
  elseif(INDEXCACHE_CUDA STREQUAL "ON")
    message(FATAL_ERROR "INDEXCACHE_CUDA=ON, but no nvcc was found: put it on PATH or set CUDACXX")
  endif()
endif()

if(INDEXCACHE_WITH_CUDA)
  # Leave out what this nvcc does not know, in plain sight, instead of failing on it.
  execute_process(COMMAND "${CMAKE_CUDA_COMPILER}" --list-gpu-arch OUTPUT_VARIABLE known COMMAND_ERROR_IS_FATAL ANY)
  foreach(arch IN LISTS INDEXCACHE_CUDA_ARCHS)
    string(REGEX MATCH "^[0-9]+" number "${arch}")
    if(known MATCHES "compute_${number}\n")
      list(APPEND INDEXCACHE_CUDA_ARCHS_USED "${arch}")
    else()
      message(STATUS "indexcache: nvcc ${CMAKE_CUDA_COMPILER_VERSION} does not know sm_${number}: left out")
    endif()
  endforeach()
  message(STATUS "indexcache: CUDA ${CMAKE_CUDA_COMPILER_VERSION} for ${INDEXCACHE_CUDA_ARCHS_USED}")
else()
  message(STATUS "indexcache: CPU only (no nvcc, or INDEXCACHE_CUDA=OFF)")
endif()

# An OBJECT library of CUDA sources for `archs`. No --use_fast_math: top-k needs NaN and infinity as they are.
function(indexcache_cuda_objects target archs)
  add_library(${target} OBJECT ${ARGN})
  target_link_libraries(${target} PRIVATE indexcache_flags CUDA::cudart_static)
  set_target_properties(${target} PROPERTIES CUDA_ARCHITECTURES "${archs}")
  target_compile_options(${target} PRIVATE
    $<$<COMPILE_LANGUAGE:CUDA>:--expt-relaxed-constexpr -lineinfo -Xptxas=-v,--warn-on-spills -Xcompiler=-Wall
      $<$<VERSION_GREATER_EQUAL:${CMAKE_CUDA_COMPILER_VERSION},13>:--compress-mode=size>>)
endfunction()
