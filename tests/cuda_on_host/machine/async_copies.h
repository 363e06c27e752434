// cp.async: copies from global to shared memory that go on while their thread does.
#pragma once

namespace cuda_on_host {

// Copies 16 bytes, of which `bytes` are read and the rest are zeros.
void copy_async(void* shared, const void* global, int bytes);

// The copies of the running thread since its last commit become a group.
void commit_copies();

// Lands all of its groups but the latest `pending`.
void wait_for_copies(int pending);

}  // namespace cuda_on_host
