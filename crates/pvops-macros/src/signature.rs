//! What a function signature may look like at a call site or under a thunk.

use syn::spanned::Spanned;
use syn::{Error, FnArg, Ident, Pat, Result, ReturnType, Signature, Type};

use crate::convention::X86_64;

/// A signature that fits the convention: a few one-word arguments in registers.
pub(crate) struct Simple {
    pub(crate) names: Vec<Ident>,
    pub(crate) types: Vec<Type>,
    /// `None` for operations that return nothing.
    pub(crate) ret: Option<Type>,
    /// `-> !`
    pub(crate) never: bool,
}

/// Checks a signature and takes it apart.
pub(crate) fn simple(signature: &Signature) -> Result<Simple> {
    let refuse = |what: &dyn quote::ToTokens, why: &str| Err(Error::new_spanned(what, why));
    if let Some(token) = &signature.asyncness {
        return refuse(token, "an async function has no convention of its own to wrap");
    }
    if let Some(token) = &signature.variadic {
        return refuse(token, "variadic functions take stack arguments, which a thunk displaces");
    }
    if !signature.generics.params.is_empty() {
        return refuse(
            &signature.generics,
            "a thunk is one piece of code for one function: generic functions cannot have one",
        );
    }
    let limit = X86_64.args.len();
    let mut simple = Simple { names: vec![], types: vec![], ret: None, never: false };
    for (index, argument) in signature.inputs.iter().enumerate() {
        if index >= limit {
            return refuse(
                argument,
                &format!(
                    "only register arguments are possible (at most {limit}): the thunk's own \
                     stack words would displace a stack argument"
                ),
            );
        }
        match argument {
            FnArg::Receiver(receiver) => {
                return refuse(receiver, "methods are not possible here: make it a free function");
            }
            FnArg::Typed(typed) => {
                let name = match &*typed.pat {
                    Pat::Ident(name) => name.ident.clone(),
                    _ => Ident::new(&format!("arg{index}"), typed.pat.span()),
                };
                simple.names.push(name);
                simple.types.push((*typed.ty).clone());
            }
        }
    }
    if let ReturnType::Type(_, ty) = &signature.output {
        match &**ty {
            Type::Never(_) => simple.never = true,
            Type::Tuple(tuple) if tuple.elems.is_empty() => {}
            ty => simple.ret = Some(ty.clone()),
        }
    }
    Ok(simple)
}
