//! Loops that are written out.

/// The body for every `$i` below `$n`, which is 8 at most, or for those of the values that are named, each time with `$i`
/// known to the compiler: an array that is read at a place it doesn't know lies in memory, not in registers.
macro_rules! unrolled {
    ($i:ident < $n:expr, $body:block) => {
        unrolled!($i < $n, $body, 0, 1, 2, 3, 4, 5, 6, 7)
    };
    ($i:ident < $n:expr, $body:block, $($value:literal),*) => {
        $(if $value < $n {
            let $i: usize = $value;
            $body
        })*
    };
}
