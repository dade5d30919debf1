# Which GPUs the kernels are compiled for where nobody says: machine code for each kind of GPU that `compiler` knows, from 7.5 on, and
# PTX of the newest desktop one, from which the driver makes code for what comes later. 8.7 is Jetson Orin and 11.0 Jetson Thor, which
# CUDA 12.8 and 12.9 call 10.1: they run no machine code of their desktop relatives. The other numbers do: 10.3 runs that of 10.0.
#
#   sdct_architectures(compiler out)    as CMAKE_CUDA_ARCHITECTURES has them
function(sdct_architectures compiler out)
  execute_process(COMMAND ${compiler} --list-gpu-code OUTPUT_VARIABLE known ERROR_QUIET RESULT_VARIABLE failed)
  set(architectures "")
  foreach(number 75 80 86 87 89 90 100 101 110 120)
    if(NOT failed AND "${known}" MATCHES "sm_${number}($|[^0-9a-z])")
      list(APPEND architectures ${number}-real)
      if(NOT number MATCHES "^(87|101|110)$")
        set(newest ${number})
      endif()
    endif()
  endforeach()
  if(NOT architectures)  # no nvcc, or one that does not tell: what every one has that compiles C++17 for the GPUs since 2018
    set(architectures 75-real 80-real)
    set(newest 80)
  endif()
  set(${out} ${architectures} ${newest}-virtual PARENT_SCOPE)
endfunction()
