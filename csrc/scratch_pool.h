// Scratch memory that is kept from one call to the next: fresh pages cost a fault each, a tenth of the time of a
// large product's gradients, and pages of 4 KiB make products a fifth slower now and then. At most 32 MiB and 4 MiB
// more for each core are kept, in the whole process.
#pragma once

#include "ops.h"

namespace llmcore {

// At least `bytes`, 64-byte aligned; data is null when there is no memory. From any thread.
Memory borrow_scratch(int64_t bytes);
void return_scratch(Memory memory);
// Give what is kept back to the system.
void release_scratch();

}  // namespace llmcore
