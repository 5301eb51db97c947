//! Weights of 4 bits become 8: `(q * slope + offset) >> FRACTION`.

use std::arch::x86_64::*;

use super::FRACTION;
use crate::base::simd::LANES;

/// What it takes, in registers.
#[derive(Clone, Copy)]
pub struct Nibbles {
    /// Where each word finds its feature's slope and offset in a line: two words are a feature's.
    slopes: __m512i,
    offsets: __m512i,
    nibble: __m512i,
    upper: __m512i,
}

/// Of a group's weights: the slopes and the offsets of their words.
#[derive(Clone, Copy)]
pub struct Line(__m512i, __m512i);

impl Nibbles {
    #[target_feature(enable = "avx512f")]
    #[inline]
    pub fn new() -> Self {
        let low = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
        let slopes = _mm512_or_si512(low, _mm512_slli_epi32::<16>(low));
        Nibbles {
            slopes,
            // Words do not carry: no number is above 31.
            offsets: _mm512_or_si512(slopes, _mm512_set1_epi16(LANES as i16)),
            nibble: _mm512_set1_epi16(15),
            upper: _mm512_set1_epi16(-256),
        }
    }

    #[target_feature(enable = "avx512f,avx512bw")]
    #[inline]
    pub fn line(&self, line: &[i16; 2 * LANES]) -> Line {
        // SAFETY: the load is of the array.
        let line = unsafe { _mm512_loadu_si512(line.as_ptr().cast()) };
        Line(_mm512_permutexvar_epi16(self.slopes, line), _mm512_permutexvar_epi16(self.offsets, line))
    }

    /// The bytes of the low halves, then those of the high ones.
    #[target_feature(enable = "avx512f,avx512bw")]
    #[inline]
    pub fn bytes(&self, codes: &[u8; 64], Line(slopes, offsets): Line) -> [__m512i; 2] {
        // SAFETY: the load is of the array.
        let words = unsafe { _mm512_loadu_si512(codes.as_ptr().cast()) };
        let code = |word| _mm512_add_epi16(_mm512_mullo_epi16(word, slopes), offsets);
        // even >> 8 | odd & upper.
        let both =
            |even, odd| _mm512_ternarylogic_epi32::<0xF8>(_mm512_srli_epi16::<{ FRACTION }>(even), odd, self.upper);
        let shifted = [_mm512_srli_epi16::<8>(words), _mm512_srli_epi16::<4>(words)];
        let [odd, even] = shifted.map(|words| _mm512_and_si512(words, self.nibble));
        let low = both(code(_mm512_and_si512(words, self.nibble)), code(odd));
        let high = both(code(even), code(_mm512_srli_epi16::<12>(words)));
        [low, high]
    }
}

impl Line {
    /// For bytes without a sign, 128 more each.
    #[target_feature(enable = "avx512f")]
    #[inline]
    pub fn unsigned(self) -> Self {
        Line(self.0, _mm512_xor_si512(self.1, _mm512_set1_epi16(i16::MIN)))
    }
}
