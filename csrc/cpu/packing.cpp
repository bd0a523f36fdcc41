#include "vec.h"
namespace clinfast { namespace CLINFAST_ISA { void pack(const PackArgs &, PackResult &) {} void unpack(const UnpackArgs &) {} } }
