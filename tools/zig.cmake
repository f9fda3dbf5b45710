# Toolchain file: Clang, a libc of choice and a C++ library that is linked statically, all from the Python package ziglang.
#
#   cmake -DCMAKE_TOOLCHAIN_FILE=tools/zig.cmake -DZIG=.../zig -DZIG_TARGET=x86_64-linux-gnu.2.28

set(CMAKE_TRY_COMPILE_PLATFORM_VARIABLES ZIG ZIG_TARGET)
if(NOT ZIG OR NOT ZIG_TARGET)
    message(FATAL_ERROR "expected the program zig in ZIG and a target such as x86_64-linux-gnu.2.28 in ZIG_TARGET, got \"${ZIG}\" and \"${ZIG_TARGET}\"")
endif()

if(ZIG_TARGET MATCHES "^([a-z0-9_]+)-(linux|macos|windows)")
    set(CMAKE_SYSTEM_PROCESSOR ${CMAKE_MATCH_1})
    string(REPLACE "linux" "Linux" CMAKE_SYSTEM_NAME ${CMAKE_MATCH_2})
    string(REPLACE "macos" "Darwin" CMAKE_SYSTEM_NAME ${CMAKE_SYSTEM_NAME})
    string(REPLACE "windows" "Windows" CMAKE_SYSTEM_NAME ${CMAKE_SYSTEM_NAME})
else()
    message(FATAL_ERROR "expected PROCESSOR-linux, -macos or -windows with what zig wants behind it, got ZIG_TARGET ${ZIG_TARGET}")
endif()

# Programs of their own, since ccache and CMake want a compiler to be one file; named so that ccache knows the options.
set(zig_bin ${CMAKE_BINARY_DIR}/zig)
foreach(pair "clang:cc -target ${ZIG_TARGET}" "clang++:c++ -target ${ZIG_TARGET}" "ar:ar" "ranlib:ranlib")
    string(FIND "${pair}" ":" colon)
    string(SUBSTRING "${pair}" 0 ${colon} name)
    math(EXPR colon "${colon} + 1")
    string(SUBSTRING "${pair}" ${colon} -1 arguments)
    if(NOT EXISTS ${zig_bin}/${name})
        file(WRITE ${zig_bin}/${name} "#!/bin/sh\nexec \"${ZIG}\" ${arguments} \"$@\"\n")
        file(CHMOD ${zig_bin}/${name} PERMISSIONS OWNER_READ OWNER_WRITE OWNER_EXECUTE)
    endif()
endforeach()
set(CMAKE_C_COMPILER   ${zig_bin}/clang)
set(CMAKE_CXX_COMPILER ${zig_bin}/clang++)
set(CMAKE_AR           ${zig_bin}/ar     CACHE FILEPATH "")
set(CMAKE_RANLIB       ${zig_bin}/ranlib CACHE FILEPATH "")

# zig keeps debug information unless told otherwise, ten times the size of the rest. Its C++ library, of which each of ours
# has a copy, leaves destructors to threads, which would call them when the library is closed and gone.
set(zig_link -s)
if(CMAKE_SYSTEM_NAME STREQUAL Linux)
    string(APPEND zig_link " -Wl,-z,nodelete")
endif()
foreach(kind SHARED MODULE)
    set(CMAKE_${kind}_LINKER_FLAGS_INIT "${zig_link}")
endforeach()
