/* The launch functions of libcuda, as empty ones. Two of them are one, as twins
 * that do the same may be. */
static volatile int launched;

#define LAUNCH(name) void name(void) { launched = launched + 1; }

LAUNCH(cuLaunchKernel)
LAUNCH(cuLaunchKernel_ptsz)
LAUNCH(cuLaunchKernelEx)
LAUNCH(cuLaunchKernelEx_ptsz)
LAUNCH(cuLaunchCooperativeKernel)
LAUNCH(cuGraphLaunch)
LAUNCH(cuGraphLaunch_ptsz)

void cuLaunchCooperativeKernel_ptsz(void)
    __attribute__((alias("cuLaunchCooperativeKernel")));
