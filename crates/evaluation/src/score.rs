//! Whether an answer holds what it should.

/// Share of `expected` that stands in `answer`: a word as a whole, whatever its case; a number as the start of a number,
/// because small models find the digits but not their end. Commas that group digits do not matter. RULER (arXiv
/// 2404.06654) is more lenient: it takes any part of a word or number, so that 416 would be found in 2416.
pub fn share_found(answer: &str, expected: &[String]) -> f64 {
    let words = words(answer);
    let stands = |wanted: &&String| match wanted.bytes().all(|byte| byte.is_ascii_digit()) {
        true => words.iter().any(|word| word.starts_with(wanted.as_str())),
        false => words.contains(&wanted.to_lowercase()),
    };
    let found = expected.iter().filter(stands).count();
    if expected.is_empty() { 1.0 } else { found as f64 / expected.len() as f64 }
}

/// Runs of letters and digits in lower case, a number without its commas.
fn words(text: &str) -> Vec<String> {
    let characters: Vec<char> = text.chars().collect();
    let digit = |index: usize| characters.get(index).is_some_and(char::is_ascii_digit);
    let mut words = vec![String::new()];
    for (index, character) in characters.iter().enumerate() {
        let groups = *character == ',' && index > 0 && digit(index - 1) && (1..=3).all(|step| digit(index + step));
        if character.is_alphanumeric() {
            words.last_mut().expect("never empty").extend(character.to_lowercase());
        } else if !groups || digit(index + 4) {
            words.push(String::new());
        }
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    fn score(answer: &str, expected: &[&str]) -> f64 {
        share_found(answer, &expected.iter().map(|&word| word.to_owned()).collect::<Vec<_>>())
    }

    #[test]
    fn numbers_count_from_their_start() {
        assert_eq!(score("2416>\nline", &["2416"]), 1.0);
        assert_eq!(score("The number is 42,527.", &["42527"]), 1.0);
        assert_eq!(score("12416 and 2415", &["2416"]), 0.0);
        assert_eq!(score("24168282", &["2416"]), 1.0, "the model did not end the number");
        assert_eq!(score("", &["2416"]), 0.0);
        assert_eq!(score("9312021,4410002, 77", &["9312021", "4410002", "77"]), 1.0, "commas of a list");
    }

    #[test]
    fn shares_of_a_list() {
        assert_eq!(score("1. Apple, 2. pears", &["apple", "pear"]), 0.5);
        assert_eq!(score("VAR ABCDE, QRSTU", &["ABCDE", "QRSTU", "XXXXX", "YYYYY"]), 0.5);
        assert_eq!(score("anything", &[]), 1.0);
    }
}
