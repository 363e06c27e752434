// How sums are shared out, for tests.
#pragma once

namespace glmkern {

// Into so many splits go the sums that an op would divide as it sees fit, where positive.
inline int forced_splits = 0;

}  // namespace glmkern
