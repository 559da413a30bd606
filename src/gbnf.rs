//! GBNF, the notation of llama.cpp's and XGrammar's grammars, to llguidance's Lark.

/// Translates; the rule `root` becomes Lark's `start`.
///
/// # Errors
/// What is no GBNF, and in which line.
pub fn to_lark(gbnf: &str) -> Result<String, String> {
    let tokens = tokenize(gbnf)?;
    let mut lark = String::new();
    let mut names = Vec::new();
    let mut index = 0;
    while index < tokens.len() {
        let [Token::Name(name), Token::Define, ..] = &tokens[index..] else {
            return Err(format!("expected `name ::=`, got {:?}", tokens[index]));
        };
        names.push(name.clone());
        lark.push_str(&format!("{}:", lark_name(name)));
        index += 2;
        // A rule ends where the next begins.
        while index < tokens.len() && !matches!(tokens[index..], [Token::Name(_), Token::Define, ..]) {
            match &tokens[index] {
                Token::Name(name) => lark.push_str(&format!(" {}", lark_name(name))),
                Token::Literal(text) => lark.push_str(&format!(" {text}")),
                Token::Class(class) => lark.push_str(&format!(" /{class}/")),
                Token::Repeat(repeat) => lark.push_str(repeat),
                Token::Operator(operator) => lark.push_str(&format!(" {operator}")),
                Token::Define => return Err("`::=` without a name before it".to_owned()),
            }
            index += 1;
        }
        lark.push('\n');
    }
    if names.iter().any(|name| name == "root") {
        Ok(lark)
    } else {
        Err("there is no rule `root`".to_owned())
    }
}

/// Lark's rules have lower-case names of letters, digits and `_`.
fn lark_name(name: &str) -> String {
    match name {
        "root" => "start".to_owned(),
        // A rule that happens to have Lark's name for the first one.
        "start" => "r_start".to_owned(),
        name => format!("r_{}", name.replace('-', "_").to_lowercase()),
    }
}

#[derive(Clone, Debug, PartialEq)]
enum Token {
    Name(String),
    Define,
    /// With its quotes; escapes as JSON has them.
    Literal(String),
    /// With its brackets, for a regular expression.
    Class(String),
    /// `*`, `+`, `?`, `{m,n}`.
    Repeat(String),
    /// `|`, `(`, `)`.
    Operator(char),
}

fn tokenize(text: &str) -> Result<Vec<Token>, String> {
    let mut tokens = Vec::new();
    let mut rest = text;
    let line = |rest: &str| text[..text.len() - rest.len()].lines().count().max(1);
    while let Some(c) = rest.chars().next() {
        let len = match c {
            c if c.is_whitespace() => c.len_utf8(),
            '#' => rest.find('\n').unwrap_or(rest.len()),
            '"' | '[' => {
                let close = if c == '"' { '"' } else { ']' };
                let len = closing(rest, close).ok_or_else(|| format!("line {}: `{c}` is never closed: {rest}", line(rest)))?;
                let content = &rest[..len];
                tokens.push(if c == '"' {
                    Token::Literal(content.to_owned())
                } else {
                    Token::Class(class(content))
                });
                len
            }
            '.' => {
                tokens.push(Token::Class("(.|\\n)".to_owned()));
                1
            }
            '*' | '+' | '?' => {
                tokens.push(Token::Repeat(c.to_string()));
                1
            }
            '{' => {
                let len = rest.find('}').ok_or_else(|| format!("line {}: `{{` is never closed", line(rest)))? + 1;
                tokens.push(Token::Repeat(rest[..len].to_owned()));
                len
            }
            '|' | '(' | ')' => {
                tokens.push(Token::Operator(c));
                1
            }
            ':' if rest.starts_with("::=") => {
                tokens.push(Token::Define);
                3
            }
            c if c.is_ascii_alphanumeric() || c == '_' => {
                let len = rest
                    .find(|c: char| !(c.is_ascii_alphanumeric() || c == '_' || c == '-'))
                    .unwrap_or(rest.len());
                tokens.push(Token::Name(rest[..len].to_owned()));
                len
            }
            c => return Err(format!("line {}: unexpected {c:?}", line(rest))),
        };
        rest = &rest[len..];
    }
    Ok(tokens)
}

/// Length of a literal or a class, its ends included; a backslash takes the next character along.
fn closing(text: &str, close: char) -> Option<usize> {
    let mut chars = text.char_indices().skip(1);
    while let Some((index, c)) = chars.next() {
        match c {
            '\\' => {
                chars.next();
            }
            c if c == close => return Some(index + close.len_utf8()),
            _ => {}
        }
    }
    None
}

/// A class of a regular expression between slashes: what is special there but not in GBNF gets a backslash.
fn class(content: &str) -> String {
    let inner = &content[1..content.len() - 1];
    let mut out = String::from("[");
    for (index, c) in inner.char_indices() {
        let escaped = inner[..index].chars().rev().take_while(|&c| c == '\\').count() % 2 == 1;
        if matches!(c, '/' | '[' | '&' | '~') && !escaped {
            out.push('\\');
        }
        out.push(c);
    }
    out.push(']');
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_are_translated() {
        let gbnf = "root ::= item (\",\" item)* # list\nitem ::= [a-z/]{1,3} |\n  \"x\\\"y\" any-thing?\nany-thing ::= .\n";
        let lark = "start: r_item ( \",\" r_item )*\nr_item: /[a-z\\/]/{1,3} | \"x\\\"y\" r_any_thing?\nr_any_thing: /(.|\\n)/\n";
        assert_eq!(to_lark(gbnf).unwrap(), lark);
    }

    #[test]
    fn errors_say_where() {
        assert!(to_lark("root ::= \"a\"\nb ::= [x").unwrap_err().contains("line 2"));
        assert!(to_lark("item ::= \"a\"").unwrap_err().contains("root"));
        assert!(to_lark("root \"a\"").unwrap_err().contains("::="));
        assert!(to_lark("root ::= @").unwrap_err().contains('@'));
    }
}
