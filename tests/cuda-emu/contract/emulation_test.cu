// The emulation's own checks: each small program with a fault must be stopped, or be seen to go wrong.
//
// Owns what only the emulation can be asked: under nvcc there is nothing to test here. Every case runs in a child
// process, since a fault ends it with exit code 70 (or a sanitizer's).
#include "../harness/harness.h"

#ifdef __CUDACC__

int main() {
    printf("the emulation is not on trial here\n");
    return 0;
}

#else

#include <sys/wait.h>
#include <unistd.h>

#include <functional>

using namespace harness;

namespace {

// ---- programs with faults ----

void barrier_in_a_branch(float* out) {
    dependency_wait();
    if (threadIdx.x < 16) {
        block_sync();
    }
    out[threadIdx.x] = 1;
}
void two_barriers(float* out) {
    dependency_wait();
    if (threadIdx.x < 32) {
        block_sync();
    } else {
        block_sync();
    }
    out[threadIdx.x] = 1;
}
void shuffle_in_a_branch(float* out) {
    dependency_wait();
    if (threadIdx.x < 16) {
        out[threadIdx.x] = shuffle_xor(1.0f, 1);
    }
}
void lanes_that_ended(float* out) {
    dependency_wait();
    if (threadIdx.x > 30) {
        return;
    }
    out[threadIdx.x] = shuffle_xor(1.0f, 1);
}
void no_dependency_wait(float* out) { out[threadIdx.x] = 1; }
void ends_before_waiting(float* out) {
    if (threadIdx.x == 3) {
        return;
    }
    dependency_wait();
    out[threadIdx.x] = 1;
}
void copy_never_waited_for(float* out) {
    PORT_SHARED(float, tile, 64 * 4);
    dependency_wait();
    copy_async(tile + threadIdx.x * 4, out, 16);
    copy_commit();
}
void misaligned_copy(float* out) {
    PORT_SHARED(float, tile, 64 * 4);
    dependency_wait();
    copy_async(tile + threadIdx.x * 4, out + 1, 16);
    copy_commit();
    copy_wait<0>();
}
void too_few_at_a_barrier(float* out) {
    dependency_wait();
    if (threadIdx.x < 32) {
        named_sync(1, 64);
    }
    out[threadIdx.x] = 1;
}
void half_a_warp_at_a_barrier(float* out) {
    dependency_wait();
    named_sync(1, 48);
    out[threadIdx.x] = 1;
}
void misaligned_matrix(float* out) {
    PORT_SHARED(bf16, tile, 1024);
    for (int i = static_cast<int>(threadIdx.x); i < 1024; i += 64) {
        tile[i] = bf16{0};
    }
    dependency_wait();
    uint32_t r[4];
    load_matrix_x4(r, tile + lane_id() * 8 + 1);
    out[threadIdx.x] = static_cast<float>(r[0]);
}
void too_much_shared(float* out) {
    PORT_SHARED(float, tile, 60 * 1024);
    dependency_wait();
    out[threadIdx.x] = tile[threadIdx.x];
}
void waits_for_nobody(float* out) {
    dependency_wait();
    while (__atomic_load_n(reinterpret_cast<uint32_t*>(out), __ATOMIC_ACQUIRE) != 1) {
        emu::spin_pause();
    }
}

// Block 0 waits for what the last block writes: blocks must run side by side.
void waits_for_the_last_block(float* out) {
    dependency_wait();
    auto* flag = reinterpret_cast<uint32_t*>(out);
    if (blockIdx.x + 1 == gridDim.x) {
        __atomic_store_n(flag, 1u, __ATOMIC_RELEASE);
    }
    while (__atomic_load_n(flag, __ATOMIC_ACQUIRE) != 1) {
        emu::spin_pause();
    }
    if (threadIdx.x == 0) {
        out[1 + blockIdx.x] = 5;
    }
}

// ---- programs that go wrong visibly ----

void reads_before_its_wait(float* out) {
    const float early = out[threadIdx.x];
    dependency_wait();
    out[threadIdx.x] = early + 1;
}
void adds_one(float* out) {
    dependency_wait();
    if (threadIdx.x == 0) {
        *out += 1;
    }
}
void unwritten_shared(float* out) {
    PORT_SHARED(float, tile, 64);
    dependency_wait();
    out[threadIdx.x] = tile[threadIdx.x];
}
void copy_without_wait(float* out) {
    PORT_SHARED(float, tile, 64 * 4);
    dependency_wait();
    copy_async(tile + threadIdx.x * 4, out + 256 + threadIdx.x * 4, 16);  // nobody writes there
    copy_commit();
    const float early = tile[threadIdx.x * 4];
    copy_wait<0>();
    out[threadIdx.x] = early;
}
void lane_outside_the_mask(float* out) {
    dependency_wait();
    if (threadIdx.x < 16) {
        out[threadIdx.x] = emu::shuffle(0xffffu, 1.0f, threadIdx.x + 16);
    }
    if (threadIdx.x >= 16) {
        out[threadIdx.x] = 1;
    }
}

using Program = void (*)(float*);

int run_in_child(const std::function<void()>& body) {
    fflush(nullptr);
    const pid_t child = fork();
    if (child == 0) {
        if (!freopen("/dev/null", "w", stderr)) {
            _exit(99);
        }
        body();
        _exit(0);
    }
    int status = 0;
    waitpid(child, &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128;
}

void queue(Program program, unsigned blocks, float* out) { LAUNCH(program, dim3(blocks), 64, 0, out); }

void must_stop(const char* name, Program program) {
    const int status = run_in_child([&] {
        Buffer<float> out(std::vector<float>(1024, 0.0f));
        queue(program, 1, out.get());
        harness::synchronize();
    });
    expect(std::string("stopped: ") + name, status == 70);
}

bool any_nan(Program program) {
    Buffer<float> out(std::vector<float>(1024, 0.0f));
    queue(program, 1, out.get());
    for (float x : out.download()) {
        if (isnan(x)) {
            return true;
        }
    }
    return false;
}

}  // namespace

int main() {
    must_stop("barrier in a branch", barrier_in_a_branch);
    must_stop("two barriers", two_barriers);
    must_stop("shuffle in a branch", shuffle_in_a_branch);
    must_stop("lanes that ended", lanes_that_ended);
    must_stop("no dependency wait", no_dependency_wait);
    must_stop("ends before waiting", ends_before_waiting);
    must_stop("copy never waited for", copy_never_waited_for);
    must_stop("misaligned copy", misaligned_copy);
    must_stop("too few at a barrier", too_few_at_a_barrier);
    must_stop("half a warp at a barrier", half_a_warp_at_a_barrier);
    must_stop("misaligned matrix", misaligned_matrix);
    must_stop("too much shared memory", too_much_shared);
    must_stop("waits for nobody", waits_for_nobody);
    expect("unwritten shared memory is NaN", any_nan(unwritten_shared));
    expect("a copy lands only at its wait", any_nan(copy_without_wait));
    expect("a lane outside the mask gives NaN", any_nan(lane_outside_the_mask));

    {
        Buffer<float> out(std::vector<float>(16, 0.0f));
        queue(waits_for_the_last_block, 8, out.get());
        const auto got = out.download();
        expect("blocks that wait for each other", std::count(got.begin(), got.end(), 5.0f) == 8);
    }
    {
        // The part before the wait runs ahead of the grids before, so it must not see what they write.
        Buffer<float> out(std::vector<float>(64, 0.0f));
        const int status = run_in_child([&] {
            for (int i = 0; i < 3; i++) {
                queue(reads_before_its_wait, 1, out.get());
            }
            const auto got = out.download();
            _exit(got[0] == 3 ? 0 : 50);
        });
        expect("reads before its wait are early", status != 0);
    }
#ifdef __SANITIZE_THREAD__
    const bool race = true;
#else
    const bool race = false;
#endif
    for (const bool lazy : {true, false}) {
        // What a host would find that reads without waiting; ThreadSanitizer ends it.
        Buffer<float> out(std::vector<float>(1, 0.0f));
        const int status = run_in_child([&] {
            emu::set_lazy(lazy);
            for (int i = 0; i < 8; i++) {
                queue(adds_one, 1, out.get());
            }
            const float early = *out.get();
            const float late = out.download()[0];
            _exit(early == (lazy ? 0 : 6) && late == 8 ? 0 : 50);
        });
        expect(lazy ? "lazy grids wait for the host" : "at most two grids wait", (status == 0) != race);
    }
    return report();
}

#endif
