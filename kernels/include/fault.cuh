// Records of what a kernel finds wrong; see src/cuda/fault.rs.
#pragma once

#include "platform.cuh"

// Sets the record {seen, value, limit, 0} unless it is set.
DEVICE void report_fault(uint32_t* record, uint32_t value, uint32_t limit) {
    if (atomicCAS(record, 0u, 1u) == 0) {
        record[1] = value;
        record[2] = limit;
    }
}
