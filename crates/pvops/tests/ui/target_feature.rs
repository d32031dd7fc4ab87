#[pvops::callee_save]
#[target_feature(enable = "avx2")]
fn wide(word: u64) -> u64 {
    word
}

fn main() {}
