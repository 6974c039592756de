#define ACE_WIDTH 4
#define ACE_ISA "portable"
#define ACE_BODIES portable_bodies
#include "bodies.h"
