#include "vec.h"
namespace clinfast { namespace CLINFAST_ISA { void pooling(const PoolingArgs &) {} } }
