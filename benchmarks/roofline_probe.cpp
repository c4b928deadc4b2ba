// What the machine can do at most: one pass of every thread over an array, and int8 products of registers alone.
#include <immintrin.h>

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

namespace {

std::uint64_t read_words(const std::uint64_t* begin, const std::uint64_t* end) {
  // Eight independent sums: the loop waits for memory and not for its own additions.
  std::uint64_t sums[8] = {};
  for (const std::uint64_t* word = begin; word + 8 <= end; word += 8)
    for (int lane = 0; lane < 8; ++lane) sums[lane] += word[lane];
  std::uint64_t total = 0;
  for (std::uint64_t sum : sums) total += sum;
  return total;
}

template <typename Work>
void on_all(int num_threads, std::size_t num_words, Work work) {
  std::vector<std::thread> threads;
  for (int i = 0; i < num_threads; ++i)
    threads.emplace_back([=] { work(i, num_words / num_threads * i, num_words / num_threads * (i + 1)); });
  for (std::thread& thread : threads) thread.join();
}

// Eight independent chains of the processor's widest int8 dot product: nothing is read from memory. The operands
// pass through empty assembly in each round, so that the compiler cannot work the sums out.
constexpr int kChains = 8;

#if defined(__AVX512VNNI__)
constexpr const char* kInstruction = "AVX-512 VNNI vpdpbusd";
constexpr int kProducts = 64;
using Vector = __m512i;
Vector load(int value) { return _mm512_set1_epi8(static_cast<char>(value)); }
Vector zero() { return _mm512_setzero_si512(); }
Vector dot(Vector sum, Vector a, Vector b) { return _mm512_dpbusd_epi32(sum, a, b); }
unsigned total(Vector sum) { return static_cast<unsigned>(_mm512_reduce_add_epi32(sum)); }
#elif defined(__AVX2__)
constexpr const char* kInstruction = "AVX2 vpmaddubsw, vpmaddwd, vpaddd";
constexpr int kProducts = 32;
using Vector = __m256i;
Vector load(int value) { return _mm256_set1_epi8(static_cast<char>(value)); }
Vector zero() { return _mm256_setzero_si256(); }
Vector dot(Vector sum, Vector a, Vector b) {
  Vector pairs = _mm256_maddubs_epi16(a, b);
  asm volatile("" : "+x"(pairs));  // the same in every round: without this it would be computed once
  return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
unsigned total(Vector sum) {
  alignas(32) unsigned lanes[8];
  _mm256_store_si256(reinterpret_cast<Vector*>(lanes), sum);
  unsigned all = 0;
  for (unsigned lane : lanes) all += lane;
  return all;
}
#else
#error "no int8 dot product is known here for this processor"
#endif

int products(long rounds, int left, int right) {
  Vector a = load(left), b = load(right), sums[kChains];
  for (Vector& sum : sums) sum = zero();
  for (long round = 0; round < rounds; ++round) {
    for (Vector& sum : sums) sum = dot(sum, a, b);
    asm volatile("" : "+x"(a), "+x"(b));
  }
  unsigned all = 0;  // wraps around, as the caller expects
  for (Vector sum : sums) all += total(sum);
  return static_cast<int>(all);
}

#if defined(__AMX_INT8__) && defined(__linux__)

constexpr int kTileProducts = 16 * 16 * 64;

// Whether the system lends this process the tile unit (Intel AMX).
bool has_tiles() {
  constexpr long kRequest = 0x1023, kTileData = 18;
  static const bool allowed = syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  return allowed;
}

// The same on the tile unit: four independent sums of 16 x 16, 64 products deep.
int tile_products(long rounds, int left, int right) {
  struct alignas(64) {
    std::uint8_t palette = 1, start = 0, reserved[14] = {};
    std::uint16_t row_bytes[16] = {};
    std::uint8_t rows[16] = {};
  } config;
  for (int tile = 0; tile < 8; ++tile) config.row_bytes[tile] = 64, config.rows[tile] = 16;
  alignas(64) signed char a[1024], b[1024];
  alignas(64) int sums[256];
  std::memset(a, left, sizeof(a)), std::memset(b, right, sizeof(b));
  asm volatile("" : : "r"(&config), "r"(a), "r"(b) : "memory");  // gcc 12's intrinsics do not say what they read
  _tile_loadconfig(&config);
  _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
  _tile_loadd(4, a, 64); _tile_loadd(5, a, 64); _tile_loadd(6, b, 64); _tile_loadd(7, b, 64);
  for (long round = 0; round < rounds; ++round) {
    _tile_dpbssd(0, 4, 6); _tile_dpbssd(1, 4, 7); _tile_dpbssd(2, 5, 6); _tile_dpbssd(3, 5, 7);
  }
  unsigned all = 0;
  const auto add = [&] {
    for (int sum : sums) all += static_cast<unsigned>(sum);
  };
  _tile_stored(0, sums, 64); add();
  _tile_stored(1, sums, 64); add();
  _tile_stored(2, sums, 64); add();
  _tile_stored(3, sums, 64); add();
  _tile_release();
  return static_cast<int>(all);
}

#else

constexpr int kTileProducts = 0;
bool has_tiles() { return false; }
int tile_products(long, int, int) { return 0; }

#endif

}  // namespace

extern "C" const char* int8_instruction() { return has_tiles() ? "AMX tdpbssd" : kInstruction; }
// Of one thread.
extern "C" int int8_products_per_round() { return has_tiles() ? 4 * kTileProducts : kChains * kProducts; }

// int8 multiplications with their additions per second, all threads together; *sum keeps the work from being left out.
extern "C" double int8_products_per_s(long rounds, int num_threads, int* sum) {
  volatile int left = 3, right = -2;
  std::vector<int> sums(static_cast<std::size_t>(num_threads) * 16);
  int a = left, b = right;
  auto began = std::chrono::steady_clock::now();
  on_all(num_threads, num_threads, [=, &sums](int thread, std::size_t, std::size_t) {
    sums[static_cast<std::size_t>(thread) * 16] = has_tiles() ? tile_products(rounds, a, b) : products(rounds, a, b);
  });
  std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - began;
  *sum = sums[0];
  return static_cast<double>(rounds) * int8_products_per_round() * num_threads / seconds.count();
}

// Writes every word, so that each page exists, near the core that will read it. num_words % (8 * num_threads) == 0.
extern "C" void fill(std::uint64_t* words, std::size_t num_words, int num_threads) {
  on_all(num_threads, num_words, [=](int, std::size_t begin, std::size_t end) {
    for (std::size_t i = begin; i < end; ++i) words[i] = i;
  });
}

// Seconds for one pass over the array; *sum receives the total of its words, so that no read can be left out.
extern "C" double read_once(const std::uint64_t* words, std::size_t num_words, int num_threads, std::uint64_t* sum) {
  std::vector<std::uint64_t> sums(static_cast<std::size_t>(num_threads) * 8);
  auto began = std::chrono::steady_clock::now();
  on_all(num_threads, num_words, [=, &sums](int thread, std::size_t begin, std::size_t end) {
    sums[static_cast<std::size_t>(thread) * 8] = read_words(words + begin, words + end);
  });
  std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - began;
  *sum = 0;
  for (std::uint64_t part : sums) *sum += part;
  return seconds.count();
}
