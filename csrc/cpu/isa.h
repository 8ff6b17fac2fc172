// Which instruction set the CPU kernels run with: detected once, or forced by ATTNKERN_CPU_ISA, one of name().
#pragma once

#include <vector>

namespace attnkern::cpu {

enum class Isa { avx512_bf16, avx512, avx2, scalar };  // in order of preference

const char* name(Isa isa);
std::vector<Isa> supported_isas();  // by this processor, best first
const char* isa_error();            // why ATTNKERN_CPU_ISA cannot be obeyed, or null
Isa active_isa();                   // throws std::invalid_argument with isa_error()

}  // namespace attnkern::cpu
