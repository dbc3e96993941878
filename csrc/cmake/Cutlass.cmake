# CUTLASS and CuTe headers: INDEXCACHE_CUTLASS_DIR, else PyPI's nvidia-cutlass wheel. Defines the target cutlass_headers
# where they are found, and INDEXCACHE_CUTLASS_VERSION ("" where not). Only the sm90 kernels use them.
set(INDEXCACHE_CUTLASS_VERSION "")
if(INDEXCACHE_WITH_CUDA)
  set(cutlass_dir "${INDEXCACHE_CUTLASS_DIR}")
  if(NOT cutlass_dir)
    execute_process(
      COMMAND "${Python_EXECUTABLE}" -c
              "import importlib.util as u; s = u.find_spec('cutlass_library'); print(s.submodule_search_locations[0] if s else '')"
      OUTPUT_VARIABLE wheel OUTPUT_STRIP_TRAILING_WHITESPACE)
    set(cutlass_dir "${wheel}/source/include")
  endif()
  if(EXISTS "${cutlass_dir}/cutlass/version.h")
    file(STRINGS "${cutlass_dir}/cutlass/version.h" lines REGEX "define CUTLASS_(MAJOR|MINOR|PATCH) ")
    string(REGEX MATCHALL "[0-9]+" numbers "${lines}")
    list(JOIN numbers "." INDEXCACHE_CUTLASS_VERSION)
    add_library(cutlass_headers INTERFACE)
    target_include_directories(cutlass_headers SYSTEM INTERFACE "${cutlass_dir}")
    message(STATUS "indexcache: CUTLASS ${INDEXCACHE_CUTLASS_VERSION}")
  elseif(INDEXCACHE_CUTLASS_DIR)
    message(FATAL_ERROR "INDEXCACHE_CUTLASS_DIR=${INDEXCACHE_CUTLASS_DIR} holds no cutlass/version.h")
  endif()
endif()
