// First in a variant: standard headers before anything is compiled for its instruction set, so that none
// of their inline functions is.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>
#include <vector>

#include "kernels.h"
