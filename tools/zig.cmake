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
# zig names the instruction sets of ARM otherwise: generic+v8_2a+fullfp16 is armv8.2-a+fp16.
set(zig_bin ${CMAKE_BINARY_DIR}/zig)
set(zig_arm [=[
for a in "$@"; do
    shift
    case "$a" in -march=armv*)
        a=$(echo "$a" | sed -E 's/^-march=armv([0-9]+)(\.([0-9]+))?-a/-mcpu=generic+v\1_\3a/; s/_a/a/; s/\+fp16/+fullfp16/; s/\+no/-/')
    esac
    set -- "$@" "$a"
done
]=])
foreach(pair "clang:cc -target ${ZIG_TARGET}" "clang++:c++ -target ${ZIG_TARGET}" "ar:ar" "ranlib:ranlib")
    string(REGEX MATCH "^([^:]+):(.*)$" _ "${pair}")
    set(zig_program ${zig_bin}/${CMAKE_MATCH_1})
    file(CONFIGURE OUTPUT ${zig_program} CONTENT "#!/bin/sh\n${zig_arm}exec \"${ZIG}\" ${CMAKE_MATCH_2} \"$@\"\n" @ONLY)
    file(CHMOD ${zig_program} PERMISSIONS OWNER_READ OWNER_WRITE OWNER_EXECUTE)
endforeach()
set(CMAKE_C_COMPILER   ${zig_bin}/clang)
set(CMAKE_CXX_COMPILER ${zig_bin}/clang++)
set(CMAKE_AR           ${zig_bin}/ar     CACHE FILEPATH "")
set(CMAKE_RANLIB       ${zig_bin}/ranlib CACHE FILEPATH "")

if(CMAKE_SYSTEM_NAME STREQUAL Darwin) # CMake wants one; libraries are linked under the names that they keep
    file(CONFIGURE OUTPUT ${zig_bin}/install_name_tool CONTENT "#!/bin/sh\nexit 1\n")
    file(CHMOD ${zig_bin}/install_name_tool PERMISSIONS OWNER_READ OWNER_WRITE OWNER_EXECUTE)
    set(CMAKE_INSTALL_NAME_TOOL ${zig_bin}/install_name_tool CACHE FILEPATH "")
endif()

# zig keeps debug information unless told otherwise, ten times the size of the rest. Its C++ library, of which each of ours
# has a copy, leaves destructors to threads, which would call them when the library is closed and gone.
set(zig_link -s)
if(CMAKE_SYSTEM_NAME STREQUAL Linux)
    string(APPEND zig_link " -Wl,-z,nodelete")
endif()
foreach(kind SHARED MODULE)
    set(CMAKE_${kind}_LINKER_FLAGS_INIT "${zig_link}")
endforeach()
