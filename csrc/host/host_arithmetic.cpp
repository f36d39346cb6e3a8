// The host_device headers behind C functions on arrays, for the tests.
#include "../host_device.h"

extern "C" __attribute__((visibility("default"))) int mmalign_host_version() { return 1; }
