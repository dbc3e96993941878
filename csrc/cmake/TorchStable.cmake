# The target torch_stable: torch's headers and libtorch.so, nothing else of torch. find_package(Torch) is not used: with a
# CUDA build of torch it drags in the whole toolkit, and the stable ABI needs none of it.
execute_process(
  COMMAND "${Python_EXECUTABLE}" -c
          "import importlib.util as u; print(u.find_spec('torch').submodule_search_locations[0])"
  OUTPUT_VARIABLE torch_dir OUTPUT_STRIP_TRAILING_WHITESPACE RESULT_VARIABLE failed)
if(failed)
  message(FATAL_ERROR "torch >= 2.10 is needed to build: install it into ${Python_EXECUTABLE}'s environment first "
                      "(pip install torch==2.13.0)")
endif()
add_library(torch_stable INTERFACE)
target_include_directories(torch_stable SYSTEM INTERFACE "${torch_dir}/include")
# The oldest torch that can load the library; newer API does not compile.
target_compile_definitions(torch_stable INTERFACE TORCH_TARGET_VERSION=0x020a000000000000)
target_link_options(torch_stable INTERFACE -Wl,--no-as-needed)
target_link_libraries(torch_stable INTERFACE "${torch_dir}/lib/libtorch.so")
