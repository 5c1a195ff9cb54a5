# What the build needs: from the system or PyPI where they have it, by download where there is a
# network.

find_package(Threads REQUIRED)

# --- Python and tvm-ffi, for the binding

if(SELECT_ATTN_PYTHON)
  find_package(Python 3.10 REQUIRED COMPONENTS Interpreter)
  execute_process(COMMAND ${Python_EXECUTABLE} -m tvm_ffi.config --cmakedir
    OUTPUT_VARIABLE tvm_ffi_ROOT OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
  find_package(tvm_ffi CONFIG REQUIRED)
  execute_process(COMMAND ${Python_EXECUTABLE} -m tvm_ffi.config --dlpack-includedir
    OUTPUT_VARIABLE tvm_ffi_dlpack OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
endif()

# --- DLPack, headers only. tvm-ffi's copy goes first: it is newer than Debian's libdlpack-dev.

find_path(SELECT_ATTN_DLPACK_INCLUDE_DIR dlpack/dlpack.h HINTS ${tvm_ffi_dlpack})
if(NOT SELECT_ATTN_DLPACK_INCLUDE_DIR)
  message(FATAL_ERROR "dlpack/dlpack.h was not found: install it (Debian and Ubuntu: apt-get "
    "install libdlpack-dev) or pass -DSELECT_ATTN_DLPACK_INCLUDE_DIR=<folder>")
endif()
add_library(select_attn_dlpack INTERFACE)
target_include_directories(select_attn_dlpack SYSTEM INTERFACE ${SELECT_ATTN_DLPACK_INCLUDE_DIR})

# --- Highway

find_package(hwy 1.0.3 CONFIG QUIET)
if(NOT hwy_FOUND)
  include(FetchContent)
  message(NOTICE "Highway >= 1.0.3 was not found and is downloaded. If that fails: Debian and Ubuntu "
    "have it (apt-get install libhwy-dev)")
  set(HWY_ENABLE_CONTRIB OFF CACHE BOOL "")
  set(HWY_ENABLE_EXAMPLES OFF CACHE BOOL "")
  set(HWY_ENABLE_INSTALL OFF CACHE BOOL "")
  set(HWY_ENABLE_TESTS OFF CACHE BOOL "")
  FetchContent_Declare(highway
    URL https://github.com/google/highway/archive/2607d3b5b0113992fe84d3848859eae13b3b52c1.tar.gz)
    # 1.4.0
  FetchContent_MakeAvailable(highway)
  add_library(hwy::hwy ALIAS hwy)
endif()

# --- GoogleTest, for the C++ tests

if(SELECT_ATTN_TESTS)
  find_package(GTest QUIET)
  if(NOT GTest_FOUND)
    include(FetchContent)
    message(NOTICE "GoogleTest was not found and is downloaded. If that fails: apt-get install "
      "libgtest-dev")
    FetchContent_Declare(googletest
      GIT_REPOSITORY https://github.com/google/googletest.git
      GIT_TAG v1.14.0)
    FetchContent_MakeAvailable(googletest)
  endif()
endif()
